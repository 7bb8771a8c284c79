"""Initialise the weights, the same in every layout: sample each full weight by its global name, then slice it."""

import zlib

import torch
from torch import Tensor

from megavit.model.config import ModelConfig
from megavit.model.parameters import CLASSIFIER_BIAS, CLASSIFIER_WEIGHT
from megavit.model.vit import EncoderStage, parameter_names
from megavit.parallel.layout import ParallelLayout
from megavit.parallel.rng import hash_int64


def initialise(model: EncoderStage, config: ModelConfig, layout: ParallelLayout, *, seed: int) -> None:
    """Fill this stage's parameters, in place, with this rank's slice of the full model's initial weights.

    Args:
        model: one pipeline stage, on the CPU.
        config: the model group.
        layout: the rank's place, which selects the slice.
        seed: `run.seed`.
    """
    for name, parameter in parameter_names(model).items():
        copy_part(initial_weight(name, whole_shape(parameter, layout), config, seed=seed), parameter, layout)


def whole_shape(parameter: torch.nn.Parameter, layout: ParallelLayout) -> torch.Size:
    """Return the shape of the full weight that a parameter is this rank's slice of."""
    axis, ranks, _ = _cut(parameter, layout)
    return torch.Size(size * ranks if dim == axis else size for dim, size in enumerate(parameter.shape))


@torch.no_grad()
def copy_part(complete: Tensor, parameter: torch.nn.Parameter, layout: ParallelLayout) -> None:
    """Fill a parameter with this rank's slice of a full weight."""
    axis, ranks, rank = _cut(parameter, layout)
    parameter.copy_(complete.chunk(ranks, axis)[rank])


def _cut(parameter: torch.nn.Parameter, layout: ParallelLayout) -> tuple[int, int, int]:
    """Return the dim along which a weight is split, the number of slices, and the index of this rank's slice."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return 0, 1, 0
    return parameter.partition_dim, layout.tp, layout.tp_rank  # type: ignore[attr-defined]


def initial_weight(name: str, shape: torch.Size, config: ModelConfig, *, seed: int) -> Tensor:
    """Sample one full weight in fp32.

    Matrices are Xavier-uniform; the patch matrix and the fused `qkv` count as one matrix each, as in MAE. Class tokens,
    mask token and positions are truncated normal with standard deviation 0.02, the classifier with `model.head_std`.
    Norm weights are one. Biases are zero, except the classifier's, which is `model.head_bias`.

    Args:
        name: the parameter's name in the full model; the sampled values depend only on it and on the seed.
        shape: shape of the full weight.
        config: the model group, for layer scale and the head.
        seed: `run.seed`.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "gamma":
        assert config.layer_scale is not None
        return torch.full(shape, config.layer_scale)
    if leaf == "bias":
        return torch.full(shape, config.head_bias if name == CLASSIFIER_BIAS else 0.0)
    if leaf == "weight" and len(shape) == 1:
        return torch.ones(shape)
    drawn_for = int(hash_int64(seed, zlib.crc32(name.encode()))) & (2**62 - 1)
    generator = torch.Generator().manual_seed(drawn_for)
    weight = torch.empty(shape)
    if leaf == "weight" and name != CLASSIFIER_WEIGHT:
        return torch.nn.init.xavier_uniform_(weight, generator=generator)
    std = config.head_std if name == CLASSIFIER_WEIGHT else 0.02
    if not std:
        return weight.zero_()
    return torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
