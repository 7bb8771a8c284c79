"""Freeze weights by patterns of their names."""

from collections.abc import Mapping
from fnmatch import fnmatch

from megavit.checkpoint.param_mapping import to_timm_name
from megavit.errors import ConfigError
from megavit.model.parameters import is_encoder
from megavit.model.vit import EncoderStage, parameter_names
from megavit.optim.config import ENCODER
from megavit.parallel.collectives import gather_objects
from megavit.parallel.layout import ParallelLayout
from megavit.validation import suggest


def freeze(
    chunks: Mapping[str, EncoderStage],
    patterns: list[str],
    *,
    new_parameters: tuple[str, ...],
    layout: ParallelLayout,
) -> None:
    """Freeze the weights that match the patterns; every rank calls this.

    A stage that trains nothing, with no trained stage before it, runs no backward pass.

    Args:
        chunks: this rank's stages by name.
        patterns: glob patterns of timm's parameter names, such as `blocks.3.*`; or the word `encoder`.
        new_parameters: prefixes of the parameters behind the encoder.
        layout: this rank's place.

    Raises:
        ConfigError: on every rank, if a pattern matches nothing, or nothing remains to train.
    """
    named = {name: param for chunk in chunks.values() for name, param in parameter_names(chunk).items()}
    frozen = {name for name in named if any(_matches(name, pattern, new_parameters) for pattern in patterns)}
    for name in frozen:
        named[name].requires_grad_(False)
    _check(patterns, list(named), frozen, new_parameters)
    _mark_frozen_stages(list(chunks.values()), layout)


def _matches(name: str, pattern: str, new_parameters: tuple[str, ...]) -> bool:
    if pattern == ENCODER:
        return is_encoder(name, new_parameters=new_parameters)
    return fnmatch(_plain(name), pattern)


def _plain(name: str) -> str:
    try:
        return to_timm_name(name)
    except KeyError:
        # A parameter of a plug-in, unknown to timm.
        return name


def _check(patterns: list[str], local: list[str], frozen: set[str], new_parameters: tuple[str, ...]) -> None:
    names: set[str] = set()
    frozen_anywhere: set[str] = set()
    for theirs, of_theirs in gather_objects((local, frozen)):
        names |= set(theirs)
        frozen_anywhere |= of_theirs
    for pattern in patterns:
        if not any(_matches(name, pattern, new_parameters) for name in names):
            near = suggest(pattern, [_plain(name) for name in sorted(names)])
            hint = f"did you mean {near}?" if near else "examples: blocks.0.*, patch_embed.*, pos_embed, encoder"
            raise ConfigError(f"optim.freeze: {pattern} matches no weight of this network; {hint}")
    if frozen_anywhere == names:
        raise ConfigError(f"optim.freeze={patterns} freezes all weights, so nothing trains; remove a pattern")


def _mark_frozen_stages(stages: list[EncoderStage], layout: ParallelLayout) -> None:
    """Set `is_frozen` of each stage: true if no encoder weight is trained in it or in an earlier stage."""
    trains = {
        (stage.vp_stage or 0) * layout.pp + layout.pp_rank: any(
            param.requires_grad
            for part in (stage.embed, stage.blocks)
            if part is not None
            for param in part.parameters()
        )
        for stage in stages
    }
    everywhere: dict[int, bool] = {}
    for theirs in gather_objects(trains):
        everywhere |= theirs
    for number, stage in zip(trains, stages, strict=True):
        stage.is_frozen = not any(everywhere[before] for before in range(number + 1))


def count_weights(chunks: Mapping[str, EncoderStage], *, layout: ParallelLayout) -> tuple[int, int]:
    """Count the trained weights and all weights of the full model; every rank calls this."""
    trained, every = 0, 0
    for chunk in chunks.values() if layout.dp_rank == 0 else ():
        for param in chunk.parameters():
            # One tensor-parallel rank counts the replicated weights.
            if layout.tp_rank == 0 or getattr(param, "tensor_model_parallel", False):
                trained += param.numel() * param.requires_grad
                every += param.numel()
    counts = gather_objects((trained, every))
    return sum(one for one, _ in counts), sum(other for _, other in counts)
