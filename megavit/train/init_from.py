"""Initialise a new run from pretrained weights, with position embeddings resized."""

from collections.abc import Iterator, Mapping

import torch

from megavit.config.experiment import ExperimentConfig
from megavit.data.class_names import go_by_number
from megavit.errors import ConfigError
from megavit.model.config import Positions
from megavit.model.layers.pos_embed import resize_positions, sincos_positions
from megavit.model.parameters import POSITIONS, is_classifier, is_decoder, is_final_norm, may_be_missing
from megavit.model.vit import EncoderStage, parameter_names
from megavit.parallel.collectives import gather_objects
from megavit.parallel.layout import ParallelLayout
from megavit.train.pretrained import Shapes, WeightsInfo, open_weights
from megavit.validation import format_value

# Settings that must be equal; positions and classifier are handled separately.
_ALIKE = ("hidden_size", "ffn_size", "num_heads", "num_layers", "patch_size", "class_tokens", "patch_bias", "qk_norm")


def load_pretrained(
    place: str,
    chunks: Mapping[str, EncoderStage],
    config: ExperimentConfig,
    layout: ParallelLayout,
    *,
    classes: tuple[str, ...],
) -> list[str]:
    """Load the weights that `init_from` names, in place; every rank calls this.

    Args:
        place: value of `init_from` (see `open_weights`).
        chunks: this rank's stages by name, with initial weights.
        config: the new run's configuration.
        layout: this rank's place.
        classes: names of the data's classes.

    Returns:
        Lines that say what was loaded and what was not.

    Raises:
        ConfigError: on every rank, if the networks differ in more than resolution and head.
    """
    weight_source = open_weights(place, num_heads=config.model.num_heads)
    weights_info = weight_source.weights_info
    _refuse_unlike(place, weights_info, config)
    there, here = weight_source.shapes(chunks, layout)
    expected = {name for chunk in chunks.values() for name in parameter_names(chunk)}
    # A classifier's features depend on the last norm.
    has_norm = all(name in there for name in expected if is_final_norm(name))
    keeps_classifier = has_norm and _keeps_classifier(weights_info, config, classes)
    left = set() if keeps_classifier else {name for name in expected if is_classifier(name)}
    full: Shapes = {}
    if POSITIONS in expected and (_is_fixed(weights_info) or _grid(weights_info) != _own_grid(config)):
        left.add(POSITIONS)
        full = {} if _is_fixed(weights_info) else {POSITIONS: there[POSITIONS]}
    reinitialised = _agree(place, expected - left, there, here, new_parameters=config.task.new_parameters)
    loaded = weight_source.load_into(chunks, expected - left - reinitialised, layout, full=full)
    if POSITIONS in left:
        _fill_positions(chunks, loaded.get(POSITIONS), weights_info, config)
    drawn = sorted(set().union(*gather_objects((left - {POSITIONS}) | reinitialised)))
    return list(_describe(weights_info, config, drawn))


def _refuse_unlike(place: str, weights_info: WeightsInfo, config: ExperimentConfig) -> None:
    pairs = [(f"model.{key}", getattr(weights_info.model, key), getattr(config.model, key)) for key in _ALIKE]
    pairs.append(("data.channels", weights_info.channels, config.data.channels))
    scales = weights_info.model.layer_scale, config.model.layer_scale
    if (scales[0] is None) != (scales[1] is None):
        pairs.append(("model.layer_scale", *scales))
    decoder = config.task.decoder(config.model)
    decoders = weights_info.decoder_heads, None if decoder is None else decoder.num_heads
    if None not in decoders:
        pairs.append(("task.decoder_num_heads", *decoders))
    differ = [
        f"{key} is {format_value(there)} in the weights and {format_value(here)} here"
        for key, there, here in pairs
        if there != here
    ]
    if config.model.positions is Positions.sincos and not _is_fixed(weights_info):
        differ.append("model.positions is learned in the weights and sincos here")
    if differ:
        raise ConfigError(
            f"init_from={place} does not fit this network: {'; '.join(differ)}; use the values of the weights"
        )


def _agree(place: str, wanted: set[str], there: Shapes, here: Shapes, *, new_parameters: tuple[str, ...]) -> set[str]:
    """Return the wanted weights that are missing and may be initialised; raise on every rank for any other mismatch."""
    absent = {name for name in wanted if name not in there}
    unlike = sorted(name for name in wanted - absent if there[name] != here[name])
    wrong = [f"{name} is {list(there[name])} in the weights and {list(here[name])} here" for name in unlike]
    lacking = [name for name in sorted(absent) if not may_be_missing(name, new_parameters=new_parameters)]
    wrong += [f"{name} is missing in the weights" for name in lacking]
    everyone = [text for texts in gather_objects(wrong) for text in texts]
    if everyone:
        raise ConfigError(f"init_from={place} does not fit this network: {everyone[0]}")
    return absent


def _keeps_classifier(weights_info: WeightsInfo, config: ExperimentConfig, classes: tuple[str, ...]) -> bool:
    """Return whether the pretrained classifier has the same classes and the same features."""
    of_probe = weights_info.is_probe or config.task.norms_features
    alike = (weights_info.model.head, weights_info.model.pool) == (config.model.head, config.model.pool)
    if of_probe or not config.task.has_classes or not alike:
        return False
    return weights_info.classes == classes or (
        not weights_info.names_classes and go_by_number(classes, weights_info.classes)
    )


def _is_fixed(weights_info: WeightsInfo) -> bool:
    return weights_info.model.positions is Positions.sincos


def _grid(weights_info: WeightsInfo) -> tuple[int, int]:
    return weights_info.model.patch_grid(weights_info.image_size)


def _own_grid(config: ExperimentConfig) -> tuple[int, int]:
    return config.model.patch_grid(config.data.image_size)


@torch.no_grad()
def _fill_positions(
    chunks: Mapping[str, EncoderStage],
    learned_N1H: torch.Tensor | None,
    weights_info: WeightsInfo,
    config: ExperimentConfig,
) -> None:
    """Fill learned positions from the pretrained ones, which may be fixed or of another grid."""
    grid, to_grid, tokens = _grid(weights_info), _own_grid(config), config.model.class_tokens
    positions_N1H = learned_N1H
    if positions_N1H is None:
        positions_N1H = sincos_positions(grid, config.model.hidden_size, class_tokens=tokens).unsqueeze(1)
    if grid != to_grid:
        positions_N1H = resize_positions(positions_N1H, class_tokens=tokens, grid=grid, to_grid=to_grid)
    for chunk in chunks.values():
        if chunk.embed is not None:
            chunk.embed.pos_embed.copy_(positions_N1H)


def _describe(weights_info: WeightsInfo, config: ExperimentConfig, drawn: list[str]) -> Iterator[str]:
    grid, to_grid = _grid(weights_info), _own_grid(config)
    resized = ""
    if grid != to_grid and config.model.positions is Positions.learned:
        resized = f"; positions resized from {grid[0]}×{grid[1]} to {to_grid[0]}×{to_grid[1]} patches"
    # A decoder has many weights: all are missing or none.
    parts = dict.fromkeys("mae_decoder.*" if is_decoder(name) else name for name in drawn)
    reinitialised = f"; {', '.join(parts)} initialised from scratch" if parts else ""
    yield f"starts from the weights of {weights_info.called}{resized}{reinitialised}"
    yield from weights_info.notes
    for key, there, here in (
        ("data.mean", weights_info.mean, config.data.mean),
        ("data.std", weights_info.std, config.data.std),
        ("model.norm_eps", weights_info.model.norm_eps, config.model.norm_eps),
    ):
        if there == here:
            continue
        if key in weights_info.guessed:
            yield (
                f"note: no file of these weights states {key}, which is {format_value(here)} here and often "
                f"{format_value(there)} elsewhere"
            )
        else:
            before, now = format_value(there), format_value(here)
            yield f"note: {key} was {before} when these weights were trained and is {now} here"
