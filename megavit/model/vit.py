"""Build one pipeline stage of the Vision Transformer: embedding on the first, head on the last, encoder layers on each.

Shapes: B images, C channels, P patches, K kept ones, V values of a patch, N tokens, H hidden. Between the embedding
and the end of the last stage, sequence parallelism puts N, of this rank, before B: Megatron-Core's linears gather and
scatter the first axis. Without it B comes first, so that attention does not have to copy its tokens into another order.
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
    """The part of the encoder that a model chunk holds, and the size of its images.

    Attributes:
        num_layers: number of encoder layers of this stage.
        virtual_stage: index of the stage among this rank's stages, from 0.
        recompute: the activations that the backward pass recomputes.
        image_size: [height, width] in pixels.
        channels: channels of an image.
    """

    num_layers: int
    virtual_stage: int
    recompute: Recompute
    image_size: list[int]
    channels: int


class EncoderStage(MegatronModule):
    """One stage's part of the encoder, or all of it if there is one stage. Subclasses add the head or the decoder.

    Args:
        config: the model group.
        mcore_config: Megatron-Core's configuration, from `transformer_config`.
        layout: this rank's place.
        stage: the part of the encoder.
        final_norm: whether the last stage norms its tokens.

    Source: arXiv 2010.11929. The split into pipeline stages is not in the paper.
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
        # Megatron-Core's schedules and finalize_model_grads read these attributes.
        self.pre_process = layout.is_first_stage(stage.virtual_stage)
        self.post_process = layout.is_last_stage(stage.virtual_stage)
        self.vp_stage = stage.virtual_stage if layout.vpp > 1 else None
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.tp_group = layout.groups.tp
        # Whether the encoder is frozen on this stage and on all stages before it (see freezing.py).
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
        """Compile each layer (see `EncoderLayer.compile_layer`)."""
        for layer in self.blocks.layers:
            layer.compile_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Set the tensor that the previous stage sent; Megatron-Core's schedules call this."""
        self.blocks.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def encode(self, patches_BPV: Tensor | None, ids_keep_BK: Tensor | None = None) -> Tensor:
        """Map normalised images, or the tensor of `set_input_tensor`, to tokens_BNH.

        Args:
            patches_BPV: patches from `patchify` on the first stage, else None.
            ids_keep_BK: int64 indices of the patches to embed; None for all.

        Returns:
            The tokens for the next stage. On the last stage they are tokens_BNH with all N tokens, also under sequence
            parallelism.
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
                # The embedding is frozen. torch's reentrant checkpointing does not look at weights: recomputed layers
                # get gradients only if their input requires one.
                tokens_BNH.requires_grad_()
        tokens_BNH = self.blocks(tokens_BNH, None)
        if self.post_process and self.config.sequence_parallel:
            # The layers that follow are replicated on every rank, so each rank already has the full gradient: split
            # it, do not sum it.
            tokens_BNH = gather_from_sequence_parallel_region(
                tokens_BNH, tensor_parallel_output_grad=False, group=self.tp_group
            ).transpose(0, 1)
        return tokens_BNH


class _WithoutGradient(torch.autograd.Function):
    """Run frozen layers of a later stage without saving activations, and return a zero gradient.

    The pipeline schedule makes the stage before wait for a gradient, although its encoder is frozen too.
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
        config, mcore_config, layout, stage: see `EncoderStage`.
        num_classes: number of classes.
        norms_features: whether a batch norm precedes the classifier's last layer, as in a linear probe.
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
            images_BCYX: normalised images on the first stage; None on other stages, which read the tensor of
                `set_input_tensor`.

        Returns:
            Logits, [images, classes] in fp32, on the last stage; tokens_BNH for the next stage elsewhere.
        """
        tokens_BNH = self.encode(None if images_BCYX is None else patchify(images_BCYX, self.patch_size))
        return tokens_BNH if self.head is None else self.head(tokens_BNH)


def parameter_names(model: EncoderStage) -> dict[str, torch.nn.Parameter]:
    """Return this stage's parameters by their names in the full model (`blocks.layers.7.…` counts across stages)."""
    named = {}
    for name, parameter in model.named_parameters():
        local = local_layer(name)
        in_model = name if local is None else with_layer(name, model.blocks.layers[local].layer_number - 1)
        named[in_model] = parameter
    return named
