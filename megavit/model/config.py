"""Settings of the network: sizes, tokens, head, backends and regularisation."""

from dataclasses import dataclass
from enum import Enum

from megavit.errors import ConfigError
from megavit.validation import require_number


class Positions(Enum):
    """Position embeddings: learned, or fixed sine-cosine."""

    learned = "learned"
    sincos = "sincos"


class Pool(Enum):
    """The input of the head: the first class token, or the mean over the patch tokens."""

    cls = "cls"
    mean = "mean"


class Head(Enum):
    """The classifier: one linear layer, or two with a tanh between them (NeMo)."""

    linear = "linear"
    tanh_mlp = "tanh_mlp"


class AttentionBackend(Enum):
    """The attention kernel.

    `sdpa`: torch chooses one. `sdpa_flash`: torch's FlashAttention-2, or an error. `flash_attn`: version 2 of the
    package of that name. `te`: Transformer Engine's. All except `sdpa` need a GPU and have not been run on one.
    """

    sdpa = "sdpa"
    sdpa_flash = "sdpa_flash"
    flash_attn = "flash_attn"
    te = "te"


class LinearBackend(Enum):
    """The implementation of the encoder layer's parallel linears.

    `local`: Megatron-Core's own. `onednn`: Megatron-Core's, but oneDNN computes the fp32 products instead of MKL; for
    CPUs only, about twice as fast on AMD processors. `fp8`: Megatron-Core's, but torch multiplies 8-bit numbers. `te`:
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
        ffn_size: hidden width of the MLP.
        num_heads: number of attention heads.
        num_layers: number of encoder layers.
        patch_size: side of a square patch, in pixels.
        class_tokens: number of class tokens: 0, 1 (timm, Hugging Face, MAE), 8 (NeMo), or more to add registers.
        positions: position embeddings, learned or fixed sine-cosine.
        pool: input of the head; `mean` excludes class tokens and applies the norm after pooling, as timm does.
        head: the classifier.
        head_bias: initial value of the classifier's last bias; NeMo starts at −10.
        head_std: standard deviation of the truncated normal that initialises the classifier's last matrix; 0
            initialises it to zeros, as NeMo's fine-tuning does.
        patch_bias: whether the patch embedding has a bias.
        attention_backend: the attention kernel. Not run on a GPU: sdpa_flash, flash_attn, te.
        linear_backend: the implementation of the parallel linears. Not run on a GPU: fp8, te.
        qk_norm: whether queries and keys get a LayerNorm per head.
        layer_scale: initial value of the per-channel scale on each residual branch; null for none.
        hidden_dropout: dropout probability after the embedding and after each residual branch.
        attention_dropout: dropout probability on the attention weights.
        drop_path: probability of dropping a residual branch in the last layer; it rises linearly from 0 in the first.
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
        """Return the numbers of patches down and across an image.

        Args:
            image_size: [height, width] in pixels.

        Raises:
            ConfigError: if the patch size does not divide the height or the width.
        """
        height, width = image_size
        if height % self.patch_size or width % self.patch_size:
            nearest = [", ".join(map(str, self._nearest_sides(side))) for side in image_size]
            raise ConfigError(
                f"data.image_size={image_size} is not divisible by model.patch_size={self.patch_size}: "
                f"{height} mod {self.patch_size} = {height % self.patch_size}, "
                f"{width} mod {self.patch_size} = {width % self.patch_size}; choose multiples of the patch size, "
                f"nearest: " + (nearest[0] if height == width else f"{nearest[0]} high and {nearest[1]} wide")
            )
        return height // self.patch_size, width // self.patch_size

    def _nearest_sides(self, side: int) -> list[int]:
        """Return the side if the patch size divides it, else the next smaller and larger sides that it divides."""
        below = side // self.patch_size * self.patch_size
        return [side] if below == side else [size for size in (below, below + self.patch_size) if size]

    def num_tokens(self, image_size: list[int]) -> int:
        """Return the number of tokens per image: patches and class tokens."""
        rows, columns = self.patch_grid(image_size)
        return rows * columns + self.class_tokens

    def check(self) -> None:
        """Raise ConfigError if settings of this group contradict each other."""
        require_number("model", self, "hidden_size", "ffn_size", "num_heads", "num_layers", "patch_size", at_least=1)
        require_number("model", self, "class_tokens", at_least=0)
        require_number("model", self, "layer_scale", "norm_eps", above=0)
        require_number("model", self, "hidden_dropout", "attention_dropout", "drop_path", at_least=0, below=1)
        require_number("model", self, "head_bias", at_least=-1e6)
        require_number("model", self, "head_std", at_least=0)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}: "
                f"{self.hidden_size} mod {self.num_heads} = {self.hidden_size % self.num_heads}"
            )
        if self.class_tokens == 0 and self.pool is Pool.cls:
            raise ConfigError("model.pool=cls needs a class token, but model.class_tokens=0; set model.pool=mean")
        if self.positions is Positions.sincos and self.hidden_size % 4:
            raise ConfigError(
                f"model.positions=sincos needs a model.hidden_size divisible by 4 (sine and cosine, rows and "
                f"columns), not {self.hidden_size}"
            )
