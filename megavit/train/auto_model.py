"""`model=auto`: the network's sizes from the weights that `init_from` names, as settings in its place.

They are resolved where a command line is read, so that ranks, jobs and the run's own config.yaml get concrete sizes.
"""

from pathlib import Path
from typing import Any

from megavit.checkpoint.convert.external_model import written
from megavit.checkpoint.convert.read import KINDS
from megavit.checkpoint.find import resolve_checkpoint
from megavit.checkpoint.manager import CheckpointManager
from megavit.config.compose import AUTO_MODEL, compose, from_yaml
from megavit.config.experiment import ExperimentConfig
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig, Pool, Positions
from megavit.task.config import TaskName
from megavit.train.pretrained import open_external
from megavit.validation import format_value, parse_int

# What the weights' shapes and function depend on, whatever stands on the encoder.
_ENCODER = (
    "hidden_size",
    "ffn_size",
    "num_heads",
    "num_layers",
    "patch_size",
    "class_tokens",
    "patch_bias",
    "qk_norm",
    "layer_scale",
    "norm_eps",
)
_DECODER = ("decoder_hidden_size", "decoder_ffn_size", "decoder_num_heads", "decoder_num_layers")


def resolve_auto(overrides: list[str]) -> tuple[list[str], str | None]:
    """Put the sizes of `init_from`'s weights in place of `model=auto`.

    A run that has a checkpoint of its own goes on with the sizes of that.

    Args:
        overrides: as typed.

    Returns:
        The settings, and what was taken, in words; None without model=auto.

    Raises:
        ConfigError: without init_from, or if the weights cannot be read.
    """
    if AUTO_MODEL not in overrides:
        return overrides, None
    rest = [text for text in overrides if text != AUTO_MODEL]
    config = compose(rest)
    own_checkpoint = _own_checkpoint(config)
    if own_checkpoint is not None:
        place, found = str(own_checkpoint), _of_run(own_checkpoint, config)
    elif config.init_from is None:
        raise ConfigError("model=auto takes the network of the weights that init_from names; type init_from=RUN too")
    else:
        place, found = config.init_from, _of_weights(config, rest)
    typed = {text.partition("=")[0] for text in rest}
    taken = [written(key, value) for key, value in found.items() if key not in typed]
    return [*rest, *taken], f"model=auto, of {place}: {' '.join(taken)}"


def _own_checkpoint(config: ExperimentConfig) -> Path | None:
    if config.checkpoint.resume == "never":
        return None
    saved = CheckpointManager(Path(config.run.dir) / "checkpoints").all()
    return next((path for path in saved if (path / "run.yaml").is_file()), None)


def _of_run(checkpoint: Path, config: ExperimentConfig) -> dict[str, Any]:
    """Of a checkpoint of the run itself: every setting of its network that `config` need not repeat."""
    saved = from_yaml((checkpoint / "run.yaml").read_text())
    found = _settings(saved.model, vars(saved.task) if config.task.name is TaskName.mae else {})
    return found | {f"model.{key}": format_value(getattr(saved.model, key)) for key in ("positions", "pool", "head")}


def _of_weights(config: ExperimentConfig, typed: list[str]) -> dict[str, Any]:
    place = config.init_from
    assert place is not None
    if place.partition(":")[0] in KINDS:
        heads = next((text.partition("=")[2] for text in typed if text.startswith("model.num_heads=")), None)
        external = open_external(place, num_heads=parse_int("model.num_heads", heads) if heads else None)
        model, decoder = external.model, external.decoder
        classifies = bool(external.classes) and external.other_pooling is None
    else:
        saved = from_yaml((resolve_checkpoint(place, setting="init_from").checkpoint / "run.yaml").read_text())
        model, decoder = saved.model, vars(saved.task)
        classifies = saved.task.name is TaskName.classify
    trains_decoder = config.task.name is TaskName.mae
    found = _settings(model, decoder if trains_decoder else {})
    if trains_decoder or model.positions is Positions.learned:
        # A classifier may learn positions that its weights have as fixed ones.
        found["model.positions"] = format_value(model.positions)
    if classifies and config.task.name is TaskName.classify:
        found |= {"model.pool": format_value(model.pool), "model.head": format_value(model.head)}
    if not model.class_tokens:
        found["model.pool"] = format_value(Pool.mean)
    return found


def _settings(model: ModelConfig, decoder: dict[str, Any]) -> dict[str, Any]:
    found = {f"model.{key}": getattr(model, key) for key in _ENCODER}
    return found | {f"task.{key}": decoder[key] for key in _DECODER if decoder.get(key) is not None}
