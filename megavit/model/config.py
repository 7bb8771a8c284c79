"""The network: widths, depths, tokens and what is regularised."""

from dataclasses import dataclass
from enum import Enum

from megavit.errors import ConfigError
from megavit.validation import require_number


class Positions(Enum):
    """How a token learns where it is."""

    learned = "learned"
    sincos = "sincos"


class Pool(Enum):
    """What the head reads: the first class token, or the mean over the patches."""

    cls = "cls"
    mean = "mean"


class Head(Enum):
    """The classifier on top: one matrix, or NeMo's matrix, tanh, matrix."""

    linear = "linear"
    tanh_mlp = "tanh_mlp"


class AttentionBackend(Enum):
    """The attention kernel, by explicit name.

    `sdpa`: torch chooses. `sdpa_flash`: torch's FlashAttention-2 or an error. `flash_attn`: the package of that name,
    version 2. `te`: Transformer Engine's. All but the first need a GPU and have not been run on one.
    """

    sdpa = "sdpa"
    sdpa_flash = "sdpa_flash"
    flash_attn = "flash_attn"
    te = "te"


class LinearBackend(Enum):
    """Whose parallel linears the encoder layer is built of.

    `local`: Megatron-Core's own. `onednn`: the same, their fp32 products by oneDNN instead of MKL, on CPUs alone; on
    AMD's processors about twice as fast. `fp8`: the same, their products of 8-bit numbers, by torch alone. `te`:
    Transformer Engine's.
    """

    local = "local"
    onednn = "onednn"
    fp8 = "fp8"
    te = "te"


@dataclass
class ModelConfig:
    """Group `model`.

    Attributes:
        hidden_size: token width h.
        ffn_size: width inside the MLP.
        num_heads: attention heads.
        num_layers: encoder layers.
        patch_size: side of a square patch, in pixels.
        class_tokens: 0, 1 (timm, Hugging Face, MAE), 8 (NeMo), or with registers any number.
        positions: learned, or fixed sine-cosine.
        pool: what the head reads; `mean` leaves class tokens out and norms after pooling, as timm does.
        head: the classifier.
        head_bias: the value its last bias starts from; NeMo starts at −10.
        head_std: deviation of the truncated normal that its last matrix is drawn from; 0 starts from zeros, as NeMo's
            fine-tuning does.
        patch_bias: whether the patch embedding has a bias.
        attention_backend: the kernel. Not run on a GPU: sdpa_flash, flash_attn, te.
        linear_backend: whose parallel linears. Not run on a GPU: fp8, te.
        qk_norm: LayerNorm of queries and keys, per head.
        layer_scale: start value of the per-channel scale on each residual branch; null for none.
        hidden_dropout: after the embedding and after each residual branch.
        attention_dropout: on the attention weights.
        drop_path: probability of dropping a residual branch, rising linearly from 0 at the first layer to this.
        norm_eps: epsilon of every LayerNorm.
    """

    hidden_size: int = 192
    ffn_size: int = 768
    num_heads: int = 3
    num_layers: int = 12
    patch_size: int = 16
    class_tokens: int = 1
    positions: Positions = Positions.learned
    pool: Pool = Pool.cls
    head: Head = Head.linear
    head_bias: float = 0.0
    head_std: float = 0.02
    patch_bias: bool = True
    attention_backend: AttentionBackend = AttentionBackend.sdpa
    linear_backend: LinearBackend = LinearBackend.local
    qk_norm: bool = False
    layer_scale: float | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    norm_eps: float = 1e-6

    def patch_grid(self, image_size: list[int]) -> tuple[int, int]:
        """Patches down and across an image of [height, width] pixels.

        Raises:
            ConfigError: if the patch does not divide the image.
        """
        height, width = image_size
        if height % self.patch_size or width % self.patch_size:
            nearest = [", ".join(map(str, self._nearest_sides(side))) for side in image_size]
            raise ConfigError(
                f"data.image_size={image_size} is not divided by model.patch_size={self.patch_size}: "
                f"{height} mod {self.patch_size} = {height % self.patch_size}, "
                f"{width} mod {self.patch_size} = {width % self.patch_size}; choose multiples of the patch, nearest: "
                + (nearest[0] if height == width else f"{nearest[0]} high and {nearest[1]} wide")
            )
        return height // self.patch_size, width // self.patch_size

    def _nearest_sides(self, side: int) -> list[int]:
        """The side itself where the patch divides it, else the next smaller and larger ones that it divides."""
        below = side // self.patch_size * self.patch_size
        return [side] if below == side else [size for size in (below, below + self.patch_size) if size]

    def num_tokens(self, image_size: list[int]) -> int:
        """Tokens per image: patches and class tokens."""
        rows, columns = self.patch_grid(image_size)
        return rows * columns + self.class_tokens

    def check(self) -> None:
        """Raise ConfigError where this group contradicts itself."""
        require_number("model", self, "hidden_size", "ffn_size", "num_heads", "num_layers", "patch_size", at_least=1)
        require_number("model", self, "class_tokens", at_least=0)
        require_number("model", self, "layer_scale", "norm_eps", above=0)
        require_number("model", self, "hidden_dropout", "attention_dropout", "drop_path", at_least=0, below=1)
        require_number("model", self, "head_bias", at_least=-1e6)
        require_number("model", self, "head_std", at_least=0)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divided by model.num_heads={self.num_heads}: "
                f"{self.hidden_size} mod {self.num_heads} = {self.hidden_size % self.num_heads}"
            )
        if self.class_tokens == 0 and self.pool is Pool.cls:
            raise ConfigError("model.pool=cls needs a class token and model.class_tokens=0; set model.pool=mean")
        if self.positions is Positions.sincos and self.hidden_size % 4:
            raise ConfigError(
                f"model.positions=sincos needs model.hidden_size in multiples of 4 (sine and cosine, down and "
                f"across), not {self.hidden_size}"
            )
