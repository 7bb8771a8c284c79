"""Build one pipeline stage of the masked autoencoder: encoder layers, and on the last stage the complete decoder.

Shapes: B images, P patches, K kept ones, V = C · patch² values of a patch, M = class tokens + K,
N = class tokens + P, H the encoder's width, D the decoder's.
"""

from dataclasses import replace

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megavit.model.config import ModelConfig
from megavit.model.layers.patch_embed import no_weight_decay
from megavit.model.layers.pos_embed import sincos_positions
from megavit.model.transformer_block import encoder_block, transformer_config
from megavit.model.vit import EncoderStage, Stage
from megavit.parallel.config import ParallelConfig
from megavit.parallel.layout import ParallelLayout


class MaskedAutoencoder(EncoderStage):
    """One stage's part of the masked autoencoder.

    Args:
        config: the model group.
        decoder: a model group with the decoder's sizes.
        mcore_config: Megatron-Core's configuration of the encoder.
        layout: this rank's place.
        parallel: the parallel group, for the decoder's recompute.
        stage: the part of the encoder.

    Source: arXiv 2111.06377, section 3. The split into pipeline stages is not in the paper.
    """

    def __init__(
        self,
        config: ModelConfig,
        decoder: ModelConfig,
        *,
        mcore_config: TransformerConfig,
        layout: ParallelLayout,
        parallel: ParallelConfig,
        stage: Stage,
    ) -> None:
        super().__init__(config, mcore_config=mcore_config, layout=layout, stage=stage, final_norm=True)
        # Not named `decoder`: Megatron-Core expects its own TransformerBlock in an attribute of that name (0.16.1).
        self.mae_decoder: Decoder | None = None
        if self.post_process:
            self.mae_decoder = Decoder(
                decoder,
                layout=layout,
                parallel=parallel,
                stage=stage,
                entering=config.hidden_size,
                mcore_config=mcore_config,
            )

    def compile_layers(self) -> None:
        """Compile each layer of the encoder and of the decoder (see `EncoderLayer.compile_layer`)."""
        super().compile_layers()
        if self.mae_decoder is not None:
            for layer in self.mae_decoder.blocks.layers:
                layer.compile_layer()

    def forward(self, patches_BPV: Tensor | None, ids_keep_BK: Tensor | None) -> Tensor:
        """Map normalised images to the pixels that the decoder predicts.

        Args:
            patches_BPV: patches from `patchify` on the first stage; None on other stages, which read the tensor of
                `set_input_tensor`.
            ids_keep_BK: int64 indices, ascending, of the patches that the encoder sees; needed on the first and the
                last stage.

        Returns:
            pixels_BPV of every patch, normalised as the target is, on the last stage; tokens_BNH elsewhere.
        """
        tokens_BMH = self.encode(patches_BPV, ids_keep_BK)
        if self.mae_decoder is None:
            return tokens_BMH
        assert ids_keep_BK is not None
        return self.mae_decoder(tokens_BMH, ids_keep_BK)


class Decoder(MegatronModule):
    """A narrow transformer over all patches: the encoder's tokens at their positions, a mask token at all others.

    The last pipeline stage holds the complete decoder. The tensor-parallel ranks split its matrices, but not its
    tokens: their numbers, such as 197 and 257, are prime, so that sequence parallelism cannot divide them.

    Args:
        config: a model group with the decoder's sizes.
        layout: this rank's place.
        parallel: the parallel group.
        stage: the part of the encoder, for the image size.
        entering: width of the encoder's tokens.
        mcore_config: Megatron-Core's configuration of the encoder, for its number format.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layout: ParallelLayout,
        parallel: ParallelConfig,
        stage: Stage,
        entering: int,
        mcore_config: TransformerConfig,
    ) -> None:
        own_layout = layout.on_one_stage()
        own_parallel = replace(parallel, recompute_method=None, recompute_layers=None, pp=1, vpp=1, overlap_p2p=False)
        own_block = transformer_config(
            config, own_parallel, own_layout, stages=[config.num_layers], dtype=mcore_config.params_dtype
        )
        super().__init__(own_block)
        hidden, dtype, self.class_tokens = config.hidden_size, mcore_config.params_dtype, config.class_tokens
        self.embed = torch.nn.Linear(entering, hidden, dtype=dtype)
        self.mask_token = no_weight_decay(torch.zeros(1, 1, hidden, dtype=dtype))
        positions = sincos_positions(config.patch_grid(stage.image_size), hidden, class_tokens=config.class_tokens)
        self.register_buffer("pos_embed", positions.unsqueeze(0).to(dtype), persistent=False)
        self.blocks = encoder_block(
            config,
            own_block,
            own_layout,
            num_layers=config.num_layers,
            recompute=parallel.recompute,
            final_norm=True,
        )
        self.pred = torch.nn.Linear(hidden, stage.channels * config.patch_size**2, dtype=dtype)

    def forward(self, tokens_BMH: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """Predict pixels_BPV of every patch, in fp32, from the encoder's tokens.

        Args:
            tokens_BMH: the encoder's tokens: class tokens, then the kept patches.
            ids_keep_BK: int64 indices of the kept patches.
        """
        narrow_BMD = self.embed(tokens_BMH)
        b, (_, n, d) = len(narrow_BMD), self.pos_embed.shape
        classes = torch.arange(self.class_tokens, device=ids_keep_BK.device).expand(b, -1)
        places_BM = torch.cat([classes, ids_keep_BK + self.class_tokens], dim=1)
        seen_BMD = narrow_BMD + self.pos_embed[0, places_BM]
        # Put a mask token everywhere, then overwrite the visible patches.
        tokens_BND = self.mask_token.expand(b, n, d) + self.pos_embed
        tokens_BND.scatter_(1, places_BM.unsqueeze(2).expand_as(seen_BMD), seen_BMD)
        tokens_BND = self.blocks(tokens_BND, None)
        return self.pred(tokens_BND[:, self.class_tokens :]).float()
