"""The Vision Transformer of one pipeline stage: embedding on the first, encoder layers on each, head on the last.

Shapes: B images, C channels, N tokens, H hidden, K classes.
"""

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megavit.model.config import ModelConfig, Pool
from megavit.model.embedding import PatchEmbedding
from megavit.model.heads import ClassifierHead
from megavit.model.kernels import attention_kernel
from megavit.model.layer import EncoderLayerSubmodules, encoder_layer_spec
from megavit.model.linears import parallel_linears
from megavit.model.norm import LayerNorm
from megavit.parallel.config import Recompute
from megavit.parallel.layout import ParallelLayout


class VisionTransformer(MegatronModule):
    """One stage's part of the classifier; with one stage, all of it.

    Args:
        config: the model group.
        block: Megatron-Core's configuration (`model/block.py`).
        layout: this rank's place.
        num_layers: encoder layers of this stage.
        virtual_stage: which of this rank's stages, from 0.
        recompute: what the backward pass computes again.
        image_size: [height, width] in pixels.
        channels: of an image.
        num_classes: K.

    Source: arXiv 2010.11929; the pipeline's cut is ours.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        block: TransformerConfig,
        layout: ParallelLayout,
        num_layers: int,
        virtual_stage: int,
        recompute: Recompute,
        image_size: list[int],
        channels: int,
        num_classes: int,
    ) -> None:
        super().__init__(block)
        # Read by Megatron-Core's schedules and by finalize_model_grads.
        self.pre_process = layout.is_first_stage(virtual_stage)
        self.post_process = layout.is_last_stage(virtual_stage)
        self.vp_stage = virtual_stage if layout.vpp > 1 else None
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.tp_group = layout.groups.tp

        self.embed: PatchEmbedding | None = None
        if self.pre_process:
            self.embed = PatchEmbedding(config, image_size=image_size, channels=channels, dtype=block.params_dtype)
        column, row = parallel_linears(config.linears)
        kernel = attention_kernel(config.attention, block, layout.groups, device=layout.device)
        spec = encoder_layer_spec(
            EncoderLayerSubmodules(column=column, row=row, kernel=kernel),
            drop_path=config.drop_path,
            layer_scale=config.layer_scale,
            recompute_selectively=recompute is Recompute.selective,
        )
        self.blocks = TransformerBlock(
            block,
            TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=LayerNorm),
            post_layer_norm=config.pool is Pool.cls,
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=layout.groups,
            vp_stage=self.vp_stage,
        )
        self.head: ClassifierHead | None = None
        if self.post_process:
            self.head = ClassifierHead(config, block=block, num_classes=num_classes)

    def compile_layers(self) -> None:
        """Hand each encoder layer to torch.compile as one graph; a break in it is an error."""
        for layer in self.blocks.layers:
            layer.compile(fullgraph=True)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Take what the previous stage sent; called by Megatron-Core's schedules."""
        self.blocks.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, images_BCYX: Tensor | None) -> Tensor:
        """Map normalised images to logits_BK.

        Args:
            images_BCYX: on the first stage; other stages read what `set_input_tensor` got.

        Returns:
            logits_BK in fp32 on the last stage, tokens_NBH for the next stage elsewhere.
        """
        tokens_NBH: Tensor | None = None
        if self.embed is not None:
            assert images_BCYX is not None
            tokens_NBH = self.embed(images_BCYX)
            if self.config.sequence_parallel:
                tokens_NBH = scatter_to_sequence_parallel_region(tokens_NBH, group=self.tp_group)
        tokens_NBH = self.blocks(tokens_NBH, None)
        if self.head is None:
            return tokens_NBH
        if self.config.sequence_parallel:
            # The head is whole on every rank, so each has the whole gradient already: split it, do not add it up.
            tokens_NBH = gather_from_sequence_parallel_region(
                tokens_NBH, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return self.head(tokens_NBH)


def parameter_names(model: VisionTransformer) -> dict[str, torch.nn.Parameter]:
    """This stage's parameters by their names in the whole model (`blocks.layers.7.…` counts from the first stage)."""
    named = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if name.startswith("blocks.layers."):
            parts[2] = str(model.blocks.layers[int(parts[2])].layer_number - 1)
        named[".".join(parts)] = parameter
    return named
