"""The masked autoencoder of one pipeline stage: the encoder on visible patches, the whole decoder on the last stage.

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
        decoder: one like it, with the decoder's sizes.
        mcore_config: Megatron-Core's configuration of the encoder.
        layout: this rank's place.
        parallel: the parallel group, for the decoder's recompute.
        stage: which part of the encoder.

    Source: arXiv 2111.06377, section 3; the pipeline's cut is ours.
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
        # Not `decoder`: Megatron-Core takes a chunk's attribute of that name for its own TransformerBlock (0.16.1).
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
        """Hand each layer of the encoder and of the decoder to torch.compile (see `EncoderLayer.compile_layer`)."""
        super().compile_layers()
        if self.mae_decoder is not None:
            for layer in self.mae_decoder.blocks.layers:
                layer.compile_layer()

    def forward(self, patches_BPV: Tensor | None, ids_keep_BK: Tensor | None) -> Tensor:
        """Map normalised images to the pixels the decoder believes in.

        Args:
            patches_BPV: the images, as `patchify` cuts them, on the first stage; other stages read what
                `set_input_tensor` got.
            ids_keep_BK: int64, ascending, the patches the encoder sees; on the first and on the last stage.

        Returns:
            pixels_BPV of every patch, in the target's space, on the last stage; tokens_BNH elsewhere.
        """
        tokens_BMH = self.encode(patches_BPV, ids_keep_BK)
        if self.mae_decoder is None:
            return tokens_BMH
        assert ids_keep_BK is not None
        return self.mae_decoder(tokens_BMH, ids_keep_BK)


class Decoder(MegatronModule):
    """A narrow transformer over all patches: the encoder's tokens where they were, a mask token elsewhere.

    It stands whole on the last pipeline stage, its matrices split over the tensor-parallel ranks, its tokens not:
    197 or 257 of them are prime and no sequence parallelism divides them.

    Args:
        config: a model group with the decoder's sizes.
        layout: this rank's place.
        parallel: the parallel group.
        stage: for the images' size.
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
        """Predict pixels_BPV, in fp32, of every patch from the encoder's tokens of the kept ones."""
        narrow_BMD = self.embed(tokens_BMH)
        b, (_, n, d) = len(narrow_BMD), self.pos_embed.shape
        classes = torch.arange(self.class_tokens, device=ids_keep_BK.device).expand(b, -1)
        places_BM = torch.cat([classes, ids_keep_BK + self.class_tokens], dim=1)
        seen_BMD = narrow_BMD + self.pos_embed[0, places_BM]
        # Written once: a mask token everywhere, over which the seen ones go.
        tokens_BND = self.mask_token.expand(b, n, d) + self.pos_embed
        tokens_BND.scatter_(1, places_BM.unsqueeze(2).expand_as(seen_BMD), seen_BMD)
        tokens_BND = self.blocks(tokens_BND, None)
        return self.pred(tokens_BND[:, self.class_tokens :]).float()
