"""The masked autoencoder in plain torch, as a baseline and as the reference in tests.

It needs no Megatron-Core and has no parallelism. Names and shapes of parameters are those of published MAE checkpoints.
Shapes: B images, P patches, K kept ones, V = patch² · C values of a patch, N tokens, H the encoder's width, D the
decoder's.
"""

import torch
from torch import Tensor, nn

from megavit.model.config import ModelConfig, Positions
from megavit.model.layers.pos_embed import sincos_positions
from megavit.model.torch_vit import TorchBlock, TorchPatchEmbed


class TorchMae(nn.Module):
    """An encoder on the kept patches and a decoder on all patches, without dropout and drop path.

    Args:
        config: the model group.
        decoder: a model group with the decoder's sizes.
        image_size: [height, width] in pixels.
        channels: channels of an image.
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor

    def __init__(self, config: ModelConfig, decoder: ModelConfig, *, image_size: list[int], channels: int) -> None:
        super().__init__()
        hidden, narrow, self.class_tokens = config.hidden_size, decoder.hidden_size, config.class_tokens
        self.patch_size, grid = config.patch_size, config.patch_grid(image_size)
        self.patch_embed = TorchPatchEmbed(config, channels)
        if config.class_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, config.class_tokens, hidden))
        positions = sincos_positions(grid, hidden, class_tokens=config.class_tokens).unsqueeze(0)
        if config.positions is Positions.learned:
            self.pos_embed = nn.Parameter(torch.zeros_like(positions))
        else:
            self.register_buffer("pos_embed", positions, persistent=False)
        self.blocks = nn.ModuleList([TorchBlock(config) for _ in range(config.num_layers)])
        self.norm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.decoder_embed = nn.Linear(hidden, narrow)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
        positions = sincos_positions(grid, narrow, class_tokens=config.class_tokens).unsqueeze(0)
        self.register_buffer("decoder_pos_embed", positions, persistent=False)
        self.decoder_blocks = nn.ModuleList([TorchBlock(decoder) for _ in range(decoder.num_layers)])
        self.decoder_norm = nn.LayerNorm(narrow, eps=config.norm_eps)
        self.decoder_pred = nn.Linear(narrow, channels * config.patch_size**2)

    def forward(self, images_BCYX: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """Predict pixels_BPV of every patch, a patch's values ordered row, column, channel."""
        patches_BPH = self.patch_embed(images_BCYX) + self.pos_embed[:, self.class_tokens :]
        tokens_BNH = patches_BPH.take_along_dim(ids_keep_BK.unsqueeze(2), dim=1)
        if self.class_tokens:
            classes = (self.cls_token + self.pos_embed[:, : self.class_tokens]).expand(len(tokens_BNH), -1, -1)
            tokens_BNH = torch.cat([classes, tokens_BNH], dim=1)
        for block in self.blocks:
            tokens_BNH = block(tokens_BNH)
        narrow_BND = self.decoder_embed(self.norm(tokens_BNH))
        classes, visible_BKD = narrow_BND.tensor_split([self.class_tokens], dim=1)
        b, _, d = visible_BKD.shape
        places_BKD = ids_keep_BK.unsqueeze(2).expand(-1, -1, d)
        patches_BPD = self.mask_token.expand(b, patches_BPH.shape[1], d).scatter(1, places_BKD, visible_BKD)
        tokens_BND = torch.cat([classes, patches_BPD], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens_BND = block(tokens_BND)
        return self.decoder_pred(self.decoder_norm(tokens_BND))[:, self.class_tokens :]
