"""Replace `model=auto` by settings with the sizes of the weights that `init_from` names.

The command line is resolved once, so that ranks, jobs and the run's config.yaml get concrete sizes.
"""

from pathlib import Path
from typing import Any

from megavit.checkpoint.convert.external_model import written
from megavit.checkpoint.convert.read import KINDS
from megavit.checkpoint.find import resolve_checkpoint
from megavit.checkpoint.manager import CheckpointManager
from megavit.config.compose import AUTO_MODEL, compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.saved import from_yaml
from megavit.errors import ConfigError
from megavit.model.config import ModelConfig, Pool, Positions
from megavit.train.pretrained import open_external
from megavit.validation import format_value, parse_int

# Settings that determine the encoder's shapes and function, whatever its head.
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


def resolve_auto(overrides: list[str]) -> tuple[list[str], str | None]:
    """Replace `model=auto` by the sizes of `init_from`'s weights.

    A run that has a checkpoint keeps the sizes of its own checkpoint.

    Args:
        overrides: settings of the command line.

    Returns:
        The settings, and a line that lists the ones found; None without model=auto.

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
        raise ConfigError("model=auto takes the network of the weights that init_from names; add init_from=RUN")
    else:
        place, found = config.init_from, _of_weights(config, rest)
    typed = {text.partition("=")[0] for text in rest}
    taken = [written(key, value) for key, value in found.items() if key not in typed]
    return [*rest, *taken], f"model=auto, from {place}: {' '.join(taken)}"


def _own_checkpoint(config: ExperimentConfig) -> Path | None:
    if config.checkpoint.resume == "never":
        return None
    saved = CheckpointManager(Path(config.run.dir) / "checkpoints").all()
    return next((path for path in saved if (path / "run.yaml").is_file()), None)


def _of_run(checkpoint: Path, config: ExperimentConfig) -> dict[str, Any]:
    """Return the network settings of the run's own checkpoint."""
    saved = from_yaml((checkpoint / "run.yaml").read_text())
    found = _settings(saved.model, vars(saved.task), keys=config.task.network_settings)
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
        classifies = saved.task.has_classes and not saved.task.norms_features
    trains_decoder = config.task.decoder(config.model) is not None
    found = _settings(model, decoder, keys=config.task.network_settings)
    if trains_decoder or model.positions is Positions.learned:
        # A classifier may learn positions that are fixed in the weights.
        found["model.positions"] = format_value(model.positions)
    if classifies and config.task.has_classes and not config.task.norms_features:
        found |= {"model.pool": format_value(model.pool), "model.head": format_value(model.head)}
    if not model.class_tokens:
        found["model.pool"] = format_value(Pool.mean)
    return found


def _settings(model: ModelConfig, task: dict[str, Any], *, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the encoder's settings, and the known settings of the task that its network depends on."""
    found = {f"model.{key}": getattr(model, key) for key in _ENCODER}
    return found | {f"task.{key}": task[key] for key in keys if task.get(key) is not None}
