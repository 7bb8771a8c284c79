"""The Vision Transformer of one pipeline stage: embedding on the first, encoder layers on each, head on the last.

Shapes: B images, C channels, P patches, K kept ones, V values of a patch, N tokens, H hidden. Between the embedding
and the end of the last stage, under sequence parallelism, N, of this rank, comes before B: Megatron-Core's linears
gather and scatter the first axis. Without it images come first, and no attention copies its tokens into another order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import ModelType
from torch import Tensor

from megavit.model.config import ModelConfig, Pool
from megavit.model.layers.head import ClassifierHead, FeatureNorm
from megavit.model.layers.patch_embed import PatchEmbed, patchify
from megavit.model.parameters import local_layer, with_layer
from megavit.model.transformer_block import encoder_block
from megavit.parallel.config import Recompute
from megavit.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Stage:
    """Which part of the encoder a chunk is, and on what images.

    Attributes:
        num_layers: encoder layers of this stage.
        virtual_stage: which of this rank's stages, from 0.
        recompute: what the backward pass computes again.
        image_size: [height, width] in pixels.
        channels: of an image.
    """

    num_layers: int
    virtual_stage: int
    recompute: Recompute
    image_size: list[int]
    channels: int


class EncoderStage(MegatronModule):
    """One stage's part of the encoder; with one stage, all of it. What follows the encoder is a subclass's.

    Args:
        config: the model group.
        mcore_config: Megatron-Core's configuration (`model/mcore_config.py`).
        layout: this rank's place.
        stage: which part.
        final_norm: whether the last stage norms its tokens.

    Source: arXiv 2010.11929; the pipeline's cut is ours.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mcore_config: TransformerConfig,
        layout: ParallelLayout,
        stage: Stage,
        final_norm: bool,
    ) -> None:
        super().__init__(mcore_config)
        # Read by Megatron-Core's schedules and by finalize_model_grads.
        self.pre_process = layout.is_first_stage(stage.virtual_stage)
        self.post_process = layout.is_last_stage(stage.virtual_stage)
        self.vp_stage = stage.virtual_stage if layout.vpp > 1 else None
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.tp_group = layout.groups.tp
        # Whether nothing of the encoder is trained, here and in the stages before (see freezing.py).
        self.is_frozen = False
        self.recomputes = stage.recompute is not Recompute.none

        self.embed: PatchEmbed | None = None
        if self.pre_process:
            self.embed = PatchEmbed(
                config, image_size=stage.image_size, channels=stage.channels, dtype=mcore_config.params_dtype
            )
        self.blocks = encoder_block(
            config,
            mcore_config,
            layout,
            num_layers=stage.num_layers,
            recompute=stage.recompute,
            final_norm=final_norm,
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=self.vp_stage,
        )

    def compile_layers(self) -> None:
        """Hand each layer to torch.compile (see `EncoderLayer.compile_layer`)."""
        for layer in self.blocks.layers:
            layer.compile_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Take what the previous stage sent; called by Megatron-Core's schedules."""
        self.blocks.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def encode(self, patches_BPV: Tensor | None, ids_keep_BK: Tensor | None = None) -> Tensor:
        """Map normalised images, or what `set_input_tensor` got, to tokens_BNH.

        Args:
            patches_BPV: the images, as `patchify` cuts them, on the first stage.
            ids_keep_BK: int64, the patches to see; None for all of them.

        Returns:
            The tokens for the next stage; after the last stage tokens_BNH, whatever sequence parallelism has split.
        """
        if not (self.is_frozen and torch.is_grad_enabled()):
            return self._encode(patches_BPV, ids_keep_BK)
        received_BNH = self.blocks.input_tensor
        if received_BNH is None:
            with torch.no_grad():
                return self._encode(patches_BPV, ids_keep_BK)
        return _WithoutGradient.apply(received_BNH, self._encode)

    def _encode(self, patches_BPV: Tensor | None = None, ids_keep_BK: Tensor | None = None) -> Tensor:
        tokens_BNH: Tensor | None = None
        if self.embed is not None:
            assert patches_BPV is not None
            tokens_BNH = self.embed(patches_BPV, ids_keep_BK)
            if self.config.sequence_parallel:
                in_order = tokens_BNH.transpose(0, 1).contiguous()
                tokens_BNH = scatter_to_sequence_parallel_region(in_order, group=self.tp_group)
            if self.recomputes and torch.is_grad_enabled() and not tokens_BNH.requires_grad:
                # The embedding is frozen. What is recomputed gets gradients only if its input wants one: torch's
                # reentrant checkpointing knows of no weights.
                tokens_BNH.requires_grad_()
        tokens_BNH = self.blocks(tokens_BNH, None)
        if self.post_process and self.config.sequence_parallel:
            # What follows is whole on every rank, so each has the whole gradient already: split it, do not add it up.
            tokens_BNH = gather_from_sequence_parallel_region(
                tokens_BNH, tensor_parallel_output_grad=False, group=self.tp_group
            ).transpose(0, 1)
        return tokens_BNH


class _WithoutGradient(torch.autograd.Function):
    """Frozen layers of a later stage: nothing is kept for a backward pass, and the stage before, which the schedule has
    wait for a gradient, is sent zeros.
    """

    @staticmethod
    def forward(ctx: Any, received_BNH: Tensor, encode: Callable[[], Tensor]) -> Tensor:
        ctx.received = received_BNH.shape
        return encode()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_zeros(ctx.received), None


class VisionTransformer(EncoderStage):
    """One stage's part of the classifier.

    Args:
        config, block, layout, stage: see `EncoderStage`.
        num_classes: scores per image.
        norms_features: whether the classifier sees features by their statistics, as a linear probe does.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mcore_config: TransformerConfig,
        layout: ParallelLayout,
        stage: Stage,
        num_classes: int,
        norms_features: bool = False,
    ) -> None:
        super().__init__(
            config, mcore_config=mcore_config, layout=layout, stage=stage, final_norm=config.pool is Pool.cls
        )
        self.patch_size = config.patch_size
        self.head: ClassifierHead | None = None
        if self.post_process:
            feature_norm = FeatureNorm(config.hidden_size, group=layout.groups.dp) if norms_features else None
            self.head = ClassifierHead(
                config, mcore_config=mcore_config, num_classes=num_classes, feature_norm=feature_norm
            )

    def forward(self, images_BCYX: Tensor | None) -> Tensor:
        """Map normalised images to class scores.

        Args:
            images_BCYX: on the first stage; other stages read what `set_input_tensor` got.

        Returns:
            Logits, [images, classes] in fp32, on the last stage, tokens_BNH for the next stage elsewhere.
        """
        tokens_BNH = self.encode(None if images_BCYX is None else patchify(images_BCYX, self.patch_size))
        return tokens_BNH if self.head is None else self.head(tokens_BNH)


def parameter_names(model: EncoderStage) -> dict[str, torch.nn.Parameter]:
    """This stage's parameters by their names in the whole model (`blocks.layers.7.…` counts from the first stage)."""
    named = {}
    for name, parameter in model.named_parameters():
        local = local_layer(name)
        in_model = name if local is None else with_layer(name, model.blocks.layers[local].layer_number - 1)
        named[in_model] = parameter
    return named
