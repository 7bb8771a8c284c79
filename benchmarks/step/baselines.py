"""Build the baselines: timm, Hugging Face and plain torch with megavit's weights, in a training step of plain torch.

Shapes: B images, K classes, P patches, V = C · patch² values of a patch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step.torch_mae import TorchMae
from benchmarks.step.workload import Work
from megavit.checkpoint.convert.hf_hub import check_hf_compatible, hf_config
from megavit.checkpoint.convert.hf_mapping import split_prefix, to_hf
from megavit.config.experiment import ExperimentConfig
from megavit.errors import ConfigError
from megavit.inference.convert import hf_decoder
from megavit.model.config import Pool, Positions
from megavit.model.layers.patch_embed import patchify
from megavit.model.torch_vit import TorchViT
from megavit.task.config import MaeConfig
from megavit.task.mae import patch_statistics
from megavit.task.masking import hidden_mask, random_keep

# Maps normalised images to output and loss; True makes an autoencoder use the masks that all candidates share.
OutputAndLoss = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


class Baseline:
    """A training step in plain torch: fused AdamW, clipped gradient norm, and fp32 copies of bf16 weights.

    Args:
        work: batch, number format and device.
        model: the model, on the device and in the work's number format.
        output_and_loss: function that returns the model's output and loss.
    """

    def __init__(self, work: Work, model: torch.nn.Module, output_and_loss: OutputAndLoss) -> None:
        self._work, self._model, self._output_and_loss = work, model.train(), output_and_loss
        optim = work.config.optim
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._weights: list[Tensor] = list(named.values())
        self._masters = self._weights
        if work.dtype is not torch.float32:
            self._masters = [weight.detach().float().requires_grad_() for weight in self._weights]
            for master in self._masters:
                master.grad = torch.zeros_like(master)
        decays = [_decays(name, weight) for name, weight in named.items()]
        groups = [
            {
                "params": [m for m, one in zip(self._masters, decays, strict=True) if one is wanted],
                "weight_decay": optim.weight_decay if wanted else 0.0,
            }
            for wanted in (True, False)
        ]
        assert optim.betas is not None and optim.eps is not None and optim.lr is not None
        self._optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True
        )
        assert optim.clip_grad is not None
        self._clip = optim.clip_grad

    def step(self, *, shared_masks: bool = False) -> None:
        self._output_and_loss(self._images(), shared_masks)[1].backward()
        if self._masters is not self._weights:
            pairs = [(m.grad, w.grad) for m, w in zip(self._masters, self._weights, strict=True)]
            torch._foreach_copy_(
                [into for into, _ in pairs if into is not None], [of for _, of in pairs if of is not None]
            )
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self._clip, foreach=True)
        # Read the norm back to the host, as training loops do.
        assert float(norm) < float("inf")
        self._optimizer.step()
        if self._masters is not self._weights:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._masters)
        for weight in self._weights:
            weight.grad = None

    def outputs(self) -> tuple[Tensor, float]:
        with torch.no_grad():
            output, loss = self._output_and_loss(self._images(), True)
            return output.float().cpu(), float(loss)

    def forward(self) -> Tensor:
        return self._output_and_loss(self._images(), False)[1]

    def held(self) -> list[Tensor]:
        grads = [grad for grad in (tensor.grad for tensor in {*self._weights, *self._masters}) if grad is not None]
        state = [value for of in self._optimizer.state.values() for value in of.values() if torch.is_tensor(value)]
        return [*self._weights, *self._masters, *grads, *state]

    def _images(self) -> Tensor:
        images = self._work.batch.images_BCYX
        assert images is not None
        return self._work.normalize(images).to(self._work.dtype)


def build_baseline(name: str, work: Work, timm_weights: dict[str, Tensor]) -> Baseline:
    """Build a baseline by its name.

    Args:
        name: timm, hf or plain; `+compile` compiles each of its layers as one graph.
        work: batch, number format and device.
        timm_weights: initial weights, in timm's names.

    Raises:
        ConfigError: if its library is not installed or has no such model.
    """
    library, _, how = name.partition("+")
    build = {"timm": _timm, "hf": _hugging_face, "plain": _plain}[library]
    model, layers, output_and_loss = build(work, timm_weights)
    model.to(work.device, work.dtype)
    if how:
        for layer in layers:
            layer.compile(fullgraph=True)
    return Baseline(work, model, output_and_loss)


def _decays(name: str, weight: Tensor) -> bool:
    return weight.ndim > 1 and not name.endswith(("_token", "pos_embed", "position_embeddings"))


def _cross_entropy(model: Callable[[Tensor], Tensor], work: Work) -> OutputAndLoss:
    labels_B = work.batch.targets["labels"]

    def output_and_loss(images_BCYX: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        logits_BK = model(images_BCYX).float()
        return logits_BK, F.cross_entropy(logits_BK, labels_B)

    return output_and_loss


def _timm(work: Work, weights: dict[str, Tensor]) -> tuple[torch.nn.Module, Any, OutputAndLoss]:
    from timm.models.vision_transformer import VisionTransformer

    model, data = work.config.model, work.config.data
    theirs = VisionTransformer(
        img_size=tuple(data.image_size),
        patch_size=model.patch_size,
        in_chans=data.channels,
        num_classes=data.num_classes or 0,
        embed_dim=model.hidden_size,
        depth=model.num_layers,
        num_heads=model.num_heads,
        mlp_ratio=model.ffn_size / model.hidden_size,
        reg_tokens=model.class_tokens - 1,
        norm_layer=partial(torch.nn.LayerNorm, eps=model.norm_eps),
    )
    prefix = split_prefix(weights, pools_class_token=model.pool is Pool.cls, learned=False)
    theirs.load_state_dict({**weights, **prefix})
    return theirs, theirs.blocks, _cross_entropy(theirs, work)


def _hugging_face(work: Work, weights: dict[str, Tensor]) -> tuple[torch.nn.Module, Any, OutputAndLoss]:
    try:
        from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError("transformers is not installed: pip install transformers") from error
    logging.disable_progress_bar()
    config = work.config
    mae = isinstance(config.task, MaeConfig)
    check_hf_compatible(config.model, config.data, is_mae=mae)
    classes = tuple(map(str, range(config.data.num_classes or 0)))
    decoder = hf_decoder(config.task) if mae else None
    about = hf_config(config.model, config.data, classes, "fp32", decoder=decoder)
    settings = {key: value for key, value in about.items() if key not in ("architectures", "model_type")}
    if mae:
        weights = {**weights, **_fixed_positions(config)}
    theirs = {key: part for name, weight in weights.items() for key, part in to_hf(name, weight).items()}
    if not mae:
        model = ViTForImageClassification.from_pretrained(None, config=ViTConfig(**settings), state_dict=theirs)
        return model, model.vit.layers, _cross_entropy(lambda images: model(images).logits, work)
    autoencoder: Any = ViTMAEForPreTraining.from_pretrained(None, config=ViTMAEConfig(**settings), state_dict=theirs)
    for name, parameter in autoencoder.named_parameters():
        if name.endswith(("pos_embed", "position_embeddings")):
            # transformers 5.23 trains the sine-cosine positions, which are fixed in the paper.
            parameter.requires_grad_(False)
    ids_keep_BK, patches = _shared_masks(work), config.num_patches
    noise = torch.full((len(ids_keep_BK), patches), 2.0, device=work.device).scatter(1, ids_keep_BK, 1.0)
    # The model sorts patches by noise: rising noise keeps the patches' order.
    noise += torch.linspace(0, 0.5, patches, device=work.device)

    def output_and_loss(images_BCYX: Tensor, shared_masks: bool) -> tuple[Tensor, Tensor]:
        found = autoencoder(images_BCYX, noise=noise if shared_masks else None)
        return _channels_first(found.logits, config.data.channels), found.loss.float()

    return autoencoder, [*autoencoder.vit.layers, *autoencoder.decoder.decoder_layers], output_and_loss


def _plain(work: Work, weights: dict[str, Tensor]) -> tuple[torch.nn.Module, Any, OutputAndLoss]:
    config = work.config
    shape: dict[str, Any] = {"image_size": config.data.image_size, "channels": config.data.channels}
    if not isinstance(config.task, MaeConfig):
        model = TorchViT(config.model, **shape, num_classes=config.data.num_classes or 0)
        model.load_state_dict(weights)
        return model, model.blocks, _cross_entropy(model, work)
    autoencoder = TorchMae(config.model, config.task.decoder(config.model), **shape)
    autoencoder.load_state_dict(weights)
    patch, channels = config.model.patch_size, config.data.channels

    def output_and_loss(images_BCYX: Tensor, _: bool) -> tuple[Tensor, Tensor]:
        ids_keep_BK = _shared_masks(work)
        pixels_BPV = autoencoder(images_BCYX, ids_keep_BK).float()
        target_BPV = _channels_last(patchify(images_BCYX.float(), patch), channels)
        if config.task.norm_pix_loss:
            mean, deviation = patch_statistics(target_BPV)
            target_BPV = (target_BPV - mean) / deviation
        errors_BP = (pixels_BPV - target_BPV).square().mean(dim=2)
        hidden_BP = hidden_mask(ids_keep_BK, config.num_patches)
        return _channels_first(pixels_BPV, channels), (errors_BP * hidden_BP).sum() / hidden_BP.sum()

    return autoencoder, [*autoencoder.blocks, *autoencoder.decoder_blocks], output_and_loss


def _channels_last(patches_BPV: Tensor, channels: int) -> Tensor:
    """Reorder a patch's values from channel, row, column (megavit) to row, column, channel (published MAE)."""
    return patches_BPV.unflatten(2, (channels, -1)).transpose(2, 3).flatten(2)


def _channels_first(patches_BPV: Tensor, channels: int) -> Tensor:
    return patches_BPV.unflatten(2, (-1, channels)).transpose(2, 3).flatten(2)


def _fixed_positions(config: ExperimentConfig) -> dict[str, Tensor]:
    """Return the sine-cosine positions of encoder and decoder, which are weights in Hugging Face's model only."""
    from megavit.model.layers.pos_embed import sincos_positions

    assert config.model.positions is Positions.sincos
    grid, tokens = config.model.patch_grid(config.data.image_size), config.model.class_tokens
    widths = {"pos_embed": config.model.hidden_size, "decoder_pos_embed": config.task.decoder_hidden_size or 0}
    return {name: sincos_positions(grid, width, class_tokens=tokens).unsqueeze(0) for name, width in widths.items()}


def _shared_masks(work: Work) -> Tensor:
    """Return ids_keep_BK, the patches that megavit's own mask keeps."""
    config = work.config
    ids_B, epochs_B, occurrences_B = (column.to(work.device) for column in work.batch.key_columns())
    return random_keep(
        ids_B,
        epochs_B,
        occurrences_B,
        config.num_patches,
        num_kept=config.task.num_visible_patches(config.num_patches),
        seed=config.run.seed,
    )
