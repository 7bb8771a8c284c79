"""Locate the first number of a step that is not finite."""

import torch
from torch import Tensor

from megavit.model.vit import EncoderStage, parameter_names
from megavit.parallel.collectives import gather_objects
from megavit.parallel.layout import ParallelLayout


def describe_nonfinite(chunks: list[EncoderStage], sums: dict[str, Tensor], layout: ParallelLayout) -> str:
    """Name the ranks and the layer; every rank calls this and gets the same text.

    A loss names the data-parallel rank; gradients name only the layer, since they are reduced by then. A value that is
    not finite spreads from its origin towards the input, so the layer closest to the loss is named.

    Args:
        chunks: this rank's stages, in order.
        sums: this rank's metric sums of the step; empty except on the last stage.
        layout: this rank's place.
    """
    named = {name: parameter for chunk in chunks for name, parameter in parameter_names(chunk).items()}
    loss_bad = "loss" in sums and not bool(torch.isfinite(sums["loss"]))
    place = (layout.rank, layout.pp_rank, loss_bad, _last_layer_not_finite(named))
    everyone = gather_objects(place)
    losses = [rank for rank, _, bad, _ in everyone if bad]
    stage = max((stage for _, stage, _, layer in everyone if layer is not None), default=None)
    layers = {rank: layer for rank, their_stage, _, layer in everyone if layer is not None and their_stage == stage}
    message = []
    if losses:
        message.append(f"the loss is not finite on rank {', '.join(map(str, losses))}")
    if layers:
        layer = next(iter(layers.values()))
        message.append(f"the gradient of {layer} is not finite on rank {', '.join(map(str, layers))}")
    return "; ".join(message) or "every gradient is finite, but their norm is not"


def _last_layer_not_finite(named: dict[str, torch.nn.Parameter]) -> str | None:
    """Return the name of the parameter closest to the loss whose gradient is not finite; None if all are finite.

    A value that is not finite spreads in the backward pass from its origin towards the input.

    Args:
        named: parameters in the order of the forward pass, by their names in the full model.
    """
    bad = None
    for name, parameter in named.items():
        gradient = getattr(parameter, "main_grad", None)
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            bad = name
    return bad
