"""Convert weights of other libraries into a run, and a run's weights into theirs."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavit.checkpoint.convert.external_model import ExternalModel, written
from megavit.checkpoint.convert.hf_hub import check_hf_compatible, hf_config, hf_preprocessor, model_card
from megavit.checkpoint.convert.read import KINDS, fetch, read_external
from megavit.checkpoint.convert.timm_config import TIMM_NORM_EPS
from megavit.checkpoint.convert.write import write_hf, write_nemo, write_timm
from megavit.checkpoint.find import resolve_checkpoint
from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.param_mapping import Dims, from_timm, to_timm, to_timm_name
from megavit.checkpoint.state import TrainingState, read_state
from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.resolved import resolve_step
from megavit.config.saved import to_yaml
from megavit.config.validate import validate
from megavit.data.config import PIXEL_SETTINGS
from megavit.errors import ConfigError
from megavit.inference.trained_run import TrainedRun, open_run, read_classes, read_config, with_settings
from megavit.model.config import Head, Positions
from megavit.model.layers.pos_embed import sincos_positions
from megavit.model.parameters import is_classifier, is_decoder, is_last_layer
from megavit.model.vit import parameter_names
from megavit.parallel.layout import ParallelLayout
from megavit.runtime.run_dir import lock_folder
from megavit.task.config import MaeConfig, TaskConfig
from megavit.train.setup import build_model
from megavit.validation import format_value

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Converted(os.PathLike[str]):
    """Weights that were converted.

    Attributes:
        path: what was written: a run's folder, or a file or folder of another library.
        notes: what was written, and what the files of one side cannot say, in lines.
    """

    path: Path
    notes: tuple[str, ...]

    def __fspath__(self) -> str:
        """Return the path."""
        return str(self.path)


def convert_weights(
    source: str, target: str, *, dtype: str | None, num_heads: int | None, pixels: list[str]
) -> Converted:
    """Convert in the direction that source and target name; one of them is a run, the other KIND:PATH.

    Args:
        source: a run, or the weights of another library.
        target: likewise.
        dtype: fp32, bf16 or fp16, of the weights written for another library; None for fp32.
        num_heads: attention heads of the weights read, where their files do not state them.
        pixels: settings of `PIXEL_SETTINGS`, where the files of another library do not state them.

    Raises:
        ConfigError: if one of them cannot be read, or the other has no place for what it holds.
    """
    kind_read, kind_written = _kind(source), _kind(target)
    if (kind_read is None) == (kind_written is None):
        raise ConfigError(
            f"megavit convert takes one run and one of {', '.join(f'{kind}:PATH' for kind in KINDS)}, not "
            f"from={source} to={target}"
        )
    if kind_read is not None:
        if dtype is not None:
            raise ConfigError(f"dtype={dtype} would be ignored: a run's weights are fp32")
        place = source.partition(":")[2]
        return _into_run(kind_read, place, Path(target), num_heads=num_heads, pixels=pixels)
    assert kind_written is not None
    if num_heads is not None:
        raise ConfigError(f"num_heads={num_heads} would be ignored: a run states its number of heads")
    if pixels:
        raise ConfigError(f"{pixels[0]} would be ignored: a run states its preprocessing of images")
    dtype = dtype or "fp32"
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype} is not known; known: {', '.join(_DTYPES)}")
    return _out_of_run(source, kind_written, Path(target.partition(":")[2]), dtype=dtype)


def check_push(repository: str | None, target: str) -> None:
    """Refuse a repository of the Hugging Face hub where the target is not for it; None passes.

    Raises:
        ConfigError: naming the form.
    """
    if repository is not None and (_kind(target) != "hf" or repository.count("/") != 1):
        raise ConfigError(f"push={repository} must be ORG/NAME on the Hugging Face hub, and needs to=hf:FOLDER")


def _kind(place: str) -> str | None:
    """Return the library that a place names; None for a run."""
    kind = place.partition(":")[0]
    return kind if kind in KINDS else None


def _into_run(kind: str, place: str, run_dir: Path, *, num_heads: int | None, pixels: list[str]) -> Converted:
    typed = {text.partition("=")[0] for text in pixels}
    external = read_external(kind, fetch(kind, place, setting="from"), num_heads=num_heads, typed=typed)
    if num_heads is not None:
        typed.add("model.num_heads")
        if num_heads != external.model.num_heads:
            raise ConfigError(f"num_heads={num_heads}, and {kind}:{place} states {external.model.num_heads}")
    if external.other_pooling is not None and external.classes:
        raise ConfigError(
            f"from={kind}:{place} pools with {external.other_pooling}; megavit's classifiers read the normalised class "
            f"token, or normalise the patches' mean (fc_norm). Its encoder can be trained: init_from={kind}:{place}"
        )
    config = with_settings(_config_of(external, run_dir), pixels)
    # The path of the data is not known yet; every other setting must be valid before the run is saved.
    validate(replace(config, data=replace(config.data, path=str(run_dir))), 1)
    store = CheckpointManager(run_dir / "checkpoints")
    with lock_folder(run_dir):
        if store.all():
            raise ConfigError(f"to={run_dir} already holds checkpoints; choose another folder")
        layout = ParallelLayout.create(config.parallel, timeout_s=config.run.timeout_s)
        network = build_model(config, layout, resolve_step(config, 1, num_classes=len(external.classes) or 1))
        _fill(network.chunks["model"], external, config)
        assumed = [key for key in (*external.assumed, *external.pixels.assumed) if key not in typed]
        state = TrainingState(0, 0, {}, classes=external.classes, optimizer=False, assumed=assumed)
        path = store.save(network.chunks, None, state, run_yaml=to_yaml(config))
        (run_dir / "config.yaml").write_text(to_yaml(config))
    count = sum(p.numel() for chunk in network.chunks.values() for p in chunk.parameters())
    written_line = f"{path}: {count:,} weights of {kind}:{place}; init_from={run_dir} starts a run from them"
    return Converted(run_dir, (written_line, *external.notes, _seen(config), *external.assumptions(typed=typed)))


def _seen(config: ExperimentConfig) -> str:
    """Describe the run's preprocessing of images, as settings."""
    return "preprocesses images with " + " ".join(
        written(key, getattr(config.data, key.removeprefix("data."))) for key in ("data.image_size", *PIXEL_SETTINGS)
    )


def _config_of(external: ExternalModel, run_dir: Path) -> ExperimentConfig:
    task = "mae" if external.decoder else "classify"
    config = compose(["recipe=null", "data=folder", f"task={task}", "train.epochs=1"])
    data = replace(
        config.data,
        image_size=external.image_size,
        channels=external.channels,
        mean=external.pixels.mean,
        std=external.pixels.std,
        crop_pct=external.pixels.crop_pct,
        interpolation=external.pixels.interpolation,
    )
    return replace(
        config,
        run=replace(config.run, name=run_dir.name or "run", dir=str(run_dir)),
        model=external.model,
        data=data,
        task=replace(config.task, **external.decoder),
    )


def _dims(config: ExperimentConfig) -> Dims:
    decoder = config.task.decoder(config.model)
    return Dims(config.model.num_heads, config.model.patch_size, 0 if decoder is None else decoder.num_heads)


@torch.no_grad()
def _fill(chunk: Any, external: ExternalModel, config: ExperimentConfig) -> None:
    """Read the weights one by one into a network.

    Raises:
        ConfigError: if a weight does not fit, is missing or is left over; names the first.
    """
    dims, wanted = _dims(config), []
    for name, parameter in parameter_names(chunk).items():
        theirs = to_timm_name(name)
        if not external.classes and not external.decoder and is_last_layer(name):
            # The model has no classifier: megavit's head keeps its initial weights, with the one class it must have.
            continue
        wanted.append(theirs)
        weight = external.weight(theirs)
        shape = to_timm({name: parameter}, dims)[theirs].shape
        if weight.shape != shape:
            raise ConfigError(f"{theirs} has shape {list(weight.shape)}, and the model's sizes need {list(shape)}")
        parameter.copy_(from_timm({theirs: weight}, dims)[name])
    left = external.unread(wanted)
    if left:
        raise ConfigError(f"megavit's network has no weight for {left[0]} ({len(left)} weights are left over)")


def _out_of_run(run: str, kind: str, target: Path, *, dtype: str) -> Converted:
    weights = resolve_checkpoint(run)
    config = read_config(weights.checkpoint)
    decoder = config.task.decoder(config.model)
    is_mae = decoder is not None
    if kind == "mae" and not is_mae:
        raise ConfigError(f"from={run} is a run of task.name={config.task.name}; to=mae: needs a masked autoencoder's")
    _refuse_target(kind, target)
    state = read_state(weights.checkpoint)
    # A run converted from a model without a classifier has an untrained head.
    headless = not config.task.has_classes or not (state.classes or state.optimizer)
    classes = () if headless else read_classes(weights.checkpoint)
    if kind == "hf":
        check_hf_compatible(config.model, config.data, is_mae=is_mae)
    trained = open_run(config, weights, num_classes=len(classes) or 1 if config.task.has_classes else 0)
    takes_decoder = kind not in ("timm", "nemo")

    def is_exported(name: str) -> bool:
        return not (is_decoder(name) and not takes_decoder) and not (is_classifier(name) and headless)

    timm_weights = _timm_weights(trained, config, is_exported=is_exported, dtype=_DTYPES[dtype])
    if kind == "hf":
        settings = hf_config(
            config.model, config.data, classes, dtype, decoder=None if decoder is None else hf_decoder(config.task)
        )
        write_hf(target, timm_weights, settings, hf_preprocessor(config.data))
        card = model_card(config.run.name, config.model, config.data, weights.checkpoint)
        (target / "README.md").write_text(card)
    elif kind == "timm":
        if config.model.head is not Head.linear:
            raise ConfigError(f"model.head={config.model.head.value}: the head of timm's ViT is one matrix")
        write_timm(target, timm_weights, config.model, config.data, classes)
    elif kind == "nemo":
        write_nemo(target, timm_weights, _dims(config))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": timm_weights}, target)
    return Converted(target, (f"{target}: {kind}, {dtype}, from {weights}", *_unsaid(kind, config)))


def _refuse_target(kind: str, target: Path) -> None:
    """Raise ConfigError if the output file, or the config.json next to it, exists already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"to={kind}:{target} exists already; choose another place")
    if kind != "hf" and target.is_dir():
        raise ConfigError(f"to={kind}:{target} is a folder; give a file in it: to={kind}:{target / 'weights'}")
    beside = target.parent / "config.json"
    if kind == "timm" and beside.exists():
        raise ConfigError(
            f"to=timm:{target} writes timm's config.json next to it, and {beside} exists already; choose another "
            f"folder: to=timm:FOLDER/{target.name}"
        )


def _unsaid(kind: str, config: ExperimentConfig) -> list[str]:
    """Return a line for each property of the run that the other library's files cannot state."""
    model, data = config.model, config.data
    lines = []
    if kind in ("mae", "nemo"):
        values = {key: getattr(data, key) for key in ("mean", "std", "image_size", "crop_pct")}
        settings = " ".join(f"data.{key}={format_value(value)}".replace(" ", "") for key, value in values.items())
        lines.append(
            f"{kind}: files state no mean, std or crop; this run has {settings} "
            f"data.interpolation={data.interpolation.value}"
        )
    if kind == "timm" and model.norm_eps != TIMM_NORM_EPS:
        lines.append(f"timm: config.json cannot state model.norm_eps={model.norm_eps:g}; timm uses {TIMM_NORM_EPS:g}")
    if kind == "hf" and data.crop_pct is not None:
        lines.append(
            "hf: its processors round the position of a centre crop down, while timm, torchvision and megavit round "
            "to the even neighbour: in at most one image of four the crop is one pixel further left or up; with "
            "data.crop_pct=null there is no difference"
        )
    if kind == "hf" and data.channels not in (1, 3):
        lines.append(
            f"hf: data.channels={data.channels}: pass Hugging Face's processor arrays of [channel, row, column] and "
            f"input_data_format='channels_first'"
        )
    return lines


def hf_decoder(task: TaskConfig) -> dict[str, Any]:
    """Return the settings of `config.json` that only ViTMAE has, not ViT."""
    assert isinstance(task, MaeConfig)
    return {
        "decoder_hidden_size": task.decoder_hidden_size,
        "decoder_intermediate_size": task.decoder_ffn_size,
        "decoder_num_attention_heads": task.decoder_num_heads,
        "decoder_num_hidden_layers": task.decoder_num_layers,
        "mask_ratio": task.mask_ratio,
        "norm_pix_loss": task.norm_pix_loss,
    }


def _timm_weights(
    run: TrainedRun, config: ExperimentConfig, *, is_exported: Callable[[str], bool], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the exported weights by timm's names, and free the run's weights one by one.

    Fixed positions are included, because other libraries store them as weights. A linear probe's feature normalisation
    is folded into its matrix, because other libraries have no weight for it.
    """
    dims, chunk = _dims(config), run.network.chunks["model"]
    head = getattr(chunk, "head", None)
    changed = head.weights_without_norm() if head is not None else {}
    timm_weights: dict[str, Tensor] = {}
    for name, parameter in parameter_names(chunk).items():
        if not is_exported(name):
            continue
        timm_weights |= {
            key: weight.to(dtype).contiguous().clone()
            for key, weight in to_timm({name: changed.get(name, parameter.data)}, dims).items()
        }
        parameter.data = torch.empty(0)
    grid, tokens = config.model.patch_grid(config.data.image_size), config.model.class_tokens
    if config.model.positions is Positions.sincos:
        timm_weights["pos_embed"] = (
            sincos_positions(grid, config.model.hidden_size, class_tokens=tokens).unsqueeze(0).to(dtype)
        )
    if "decoder_embed.weight" in timm_weights:
        decoder = config.task.decoder(config.model)
        assert decoder is not None
        timm_weights["decoder_pos_embed"] = (
            sincos_positions(grid, decoder.hidden_size, class_tokens=tokens).unsqueeze(0).to(dtype)
        )
    return timm_weights
