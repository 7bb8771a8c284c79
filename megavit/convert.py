"""`megavit convert from=… to=…`: weights of timm, Hugging Face and MAE into a run, and a run's weights into theirs."""

import ctypes
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavit.checkpoint.names import Dims, from_plain, plain_name, to_plain
from megavit.checkpoint.state import TrainingState
from megavit.checkpoint.store import CheckpointStore
from megavit.checks import whole_number
from megavit.compose import compose, to_yaml
from megavit.config import RunConfig
from megavit.errors import ConfigError
from megavit.exchange import ForeignModel, read_foreign, write_hf, write_nemo, write_timm
from megavit.exits import FINISHED
from megavit.model.config import Head, Pool, Positions
from megavit.model.embedding import sincos_positions
from megavit.model.vit import parameter_names
from megavit.network import build_network
from megavit.parallel.layout import ParallelLayout
from megavit.run_folder import lock_folder
from megavit.search import find_checkpoint
from megavit.task.config import TaskName
from megavit.trained import TrainedRun, open_run, read_classes, read_config
from megavit.verb_arguments import parse_arguments

_KINDS = ("hf", "timm", "mae", "nemo")
# Of glibc's malloc.h.
_M_MMAP_THRESHOLD = -3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HUB_FILES = ["*.json", "*.safetensors"]


def convert(arguments: list[str]) -> int:
    """Convert in the direction that the arguments name.

    Args:
        arguments: `from=KIND:PATH to=RUN` or `from=RUN to=KIND:PATH`, KIND one of hf, timm, mae, nemo; optionally
            `dtype=fp32|bf16|fp16` and `push=ORG/NAME` on the way out and `num_heads=N` on the way in.

    Raises:
        ConfigError: if one of them cannot be read, or the other has no place for what it holds.
    """
    _return_freed_memory()
    given = parse_arguments("convert", arguments, needed=("from", "to"), optional=("dtype", "num_heads", "push"))
    kinds = {key: given[key].partition(":")[0] for key in ("from", "to") if given[key].partition(":")[0] in _KINDS}
    if len(kinds) != 1:
        raise ConfigError(
            f"megavit convert takes one run and one of {', '.join(f'{kind}:PATH' for kind in _KINDS)}, not "
            f"from={given['from']} to={given['to']}"
        )
    if "from" in kinds:
        if "dtype" in given:
            raise ConfigError(f"dtype={given['dtype']} would be ignored: a run's weights are fp32")
        heads = whole_number("num_heads", given["num_heads"]) if "num_heads" in given else None
        return _into_run(kinds["from"], given["from"].partition(":")[2], Path(given["to"]), num_heads=heads)
    push = given.get("push")
    if push is not None and (kinds["to"] != "hf" or push.count("/") != 1):
        raise ConfigError(f"push={push} takes ORG/NAME, where to=hf:FOLDER goes on the Hugging Face hub")
    if "num_heads" in given:
        raise ConfigError(f"num_heads={given['num_heads']} would be ignored: a run knows its heads")
    dtype = given.get("dtype", "fp32")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype} is not known; known: {', '.join(_DTYPES)}")
    target = Path(given["to"].partition(":")[2])
    _out_of_run(Path(given["from"]), kinds["to"], target, dtype=dtype)
    if push is not None:
        _push(target, push)
    return FINISHED


def _return_freed_memory() -> None:
    """Have glibc give a tensor's memory back when it is freed; those up to 32 MB it would keep, half a model's size."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def _into_run(kind: str, place: str, run_dir: Path, *, num_heads: int | None) -> int:
    foreign = read_foreign(kind, _download(kind, place), num_heads=num_heads)
    config = _config_of(kind, foreign, run_dir)
    store = CheckpointStore(run_dir / "checkpoints")
    with lock_folder(run_dir):
        if store.all():
            raise ConfigError(f"to={run_dir} already holds checkpoints; choose another folder")
        layout = ParallelLayout.create(config.parallel, timeout_s=config.run.timeout_s)
        network = build_network(config, layout, num_classes=len(foreign.classes) or 1)
        _fill(network.chunks["model"], foreign, config)
        state = TrainingState(0, 0, {}, classes=foreign.classes, optimizer=False)
        path = store.save(network.chunks, None, state, run_yaml=to_yaml(config))
        (run_dir / "config.yaml").write_text(to_yaml(config))
    count = sum(p.numel() for chunk in network.chunks.values() for p in chunk.parameters())
    print(f"{path}: {count:,} weights of {kind}:{place}; init_from={run_dir} starts a run from them")
    if foreign.assumes:
        print(foreign.assumes)
    return FINISHED


def _download(kind: str, place: str) -> Path:
    path = Path(place)
    if path.exists() or kind in ("mae", "nemo") or place.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(place, allow_patterns=_HUB_FILES))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigError(
            f"from={kind}:{place} is no path here, and the Hugging Face hub does not give it: "
            f"{str(error).splitlines()[0]}. Without a network, copy its files here and name the path"
        ) from error
    return folder if kind == "hf" else folder / "model.safetensors"


def _config_of(kind: str, foreign: ForeignModel, run_dir: Path) -> RunConfig:
    foreign.model.check()
    task = "mae" if foreign.decoder else "classify"
    config = compose(["recipe=null", "data=folder", f"task={task}", "train.epochs=1"])
    data = replace(
        config.data,
        image_size=foreign.image_size,
        channels=foreign.channels,
        mean=foreign.mean,
        std=foreign.std,
        # Hugging Face's processor and NeMo resize the whole image, timm's evaluation cuts the centre out.
        eval_crop=None if kind in ("hf", "nemo") else 0.9,
    )
    return replace(
        config,
        run=replace(config.run, name=run_dir.name or "run", dir=str(run_dir)),
        model=foreign.model,
        data=data,
        task=replace(config.task, **foreign.decoder),
    )


def _dims(config: RunConfig) -> Dims:
    return Dims(config.model.num_heads, config.model.patch_size, config.task.decoder_num_heads or 0)


@torch.no_grad()
def _fill(chunk: Any, foreign: ForeignModel, config: RunConfig) -> None:
    """Read the weights one by one into a network.

    Raises:
        ConfigError: naming the first that does not fit, is missing or is left over.
    """
    dims, wanted = _dims(config), []
    for name, parameter in parameter_names(chunk).items():
        theirs = plain_name(name)
        if not foreign.classes and not foreign.decoder and theirs.startswith("head."):
            # A model without a classifier: ours keeps its first weights, under the one class that must be.
            continue
        wanted.append(theirs)
        weight = foreign.weight(theirs)
        shape = to_plain({name: parameter}, dims)[theirs].shape
        if weight.shape != shape:
            raise ConfigError(
                f"{theirs} is {list(weight.shape)} there and {list(shape)} here: the sizes read from it do not fit it"
            )
        parameter.copy_(from_plain({theirs: weight}, dims)[name])
    left = foreign.unread(wanted)
    if left:
        raise ConfigError(f"{left[0]} has no place in megavit's network ({len(left)} weights are left over)")


def _push(folder: Path, repository: str) -> None:
    """Copy a folder to the hub; a repository that is made for it is private."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Converted by megavit")
    except Exception as error:
        # Without a network its HTTP library raises errors of its own, which are no OSError.
        known = (OSError, HfHubHTTPError, HFValidationError, LocalTokenNotFoundError)
        if not isinstance(error, known) and not type(error).__module__.startswith("httpx"):
            raise
        told = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise ConfigError(
            f"push={repository}: the Hugging Face hub does not take it: {told}. {folder} is whole; `hf auth login` "
            f"and `hf upload {repository} {folder}` do the rest"
        ) from error
    print(f"https://huggingface.co/{repository}: a new repository is private until you publish it")


def _out_of_run(run: Path, kind: str, target: Path, *, dtype: str) -> None:
    checkpoint = find_checkpoint(run)
    config = read_config(checkpoint)
    is_mae = config.task.name is TaskName.mae
    if kind == "mae" and not is_mae:
        raise ConfigError(f"from={run} is a run of task.name=classify; to=mae: takes a masked autoencoder's")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"to={kind}:{target} is there already; choose another place")
    classes = () if is_mae else read_classes(checkpoint)
    trained = open_run(config, checkpoint, num_classes=len(classes))
    plain = _plain_weights(trained, config, decoder=is_mae and kind not in ("timm", "nemo"), dtype=_DTYPES[dtype])
    if kind == "hf":
        _refuse_unlike_hf(config)
        write_hf(target, plain, _hf_config(config, classes, dtype), _preprocessor(config))
        (target / "README.md").write_text(_card(config, checkpoint))
    elif kind == "timm":
        if config.model.head is not Head.linear:
            raise ConfigError(f"model.head={config.model.head.value}: timm's ViT has one matrix for a head")
        write_timm(target, plain, config.model)
    elif kind == "nemo":
        write_nemo(target, plain, _dims(config))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": plain}, target)
    print(f"{target}: {kind}, {dtype}, of {checkpoint}")


def _plain_weights(run: TrainedRun, config: RunConfig, *, decoder: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every weight by its plain name, ours given up one by one; fixed positions too, which theirs keep as weights."""
    dims, chunk = _dims(config), run.network.chunks["model"]
    plain: dict[str, Tensor] = {}
    for name, parameter in parameter_names(chunk).items():
        if not decoder and name.startswith("mae_decoder."):
            continue
        plain |= {
            key: weight.to(dtype).contiguous().clone() for key, weight in to_plain({name: parameter.data}, dims).items()
        }
        parameter.data = torch.empty(0)
    grid, tokens = config.model.patch_grid(config.data.image_size), config.model.class_tokens
    if config.model.positions is Positions.sincos:
        plain["pos_embed"] = (
            sincos_positions(grid, config.model.hidden_size, class_tokens=tokens).unsqueeze(0).to(dtype)
        )
    if decoder:
        narrow = config.task.decoder_hidden_size
        assert narrow is not None
        plain["decoder_pos_embed"] = sincos_positions(grid, narrow, class_tokens=tokens).unsqueeze(0).to(dtype)
    return plain


def _refuse_unlike_hf(config: RunConfig) -> None:
    model, mae = config.model, config.task.name is TaskName.mae
    reasons = {
        f"model.class_tokens={model.class_tokens}": model.class_tokens != 1,
        f"model.pool={model.pool.value}": model.pool is not Pool.cls and not mae,
        f"model.head={model.head.value}": model.head is not Head.linear and not mae,
        "model.patch_bias=false": not model.patch_bias,
        "model.qk_norm=true": model.qk_norm,
        f"model.layer_scale={model.layer_scale}": model.layer_scale is not None,
        f"data.image_size={config.data.image_size}": mae and len(set(config.data.image_size)) > 1,
    }
    for setting, differs in reasons.items():
        if differs:
            raise ConfigError(f"{setting}: Hugging Face's {'ViTMAE' if mae else 'ViT'} has no such; to=timm: may have")


def _hf_config(config: RunConfig, classes: tuple[str, ...], dtype: str) -> dict[str, Any]:
    model, task = config.model, config.task
    size = config.data.image_size
    settings: dict[str, Any] = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "patch_size": model.patch_size,
        "image_size": size[0] if size[0] == size[1] else size,
        "num_channels": config.data.channels,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype],
    }
    if config.task.name is TaskName.mae:
        return settings | {
            "architectures": ["ViTMAEForPreTraining"],
            "model_type": "vit_mae",
            "decoder_hidden_size": task.decoder_hidden_size,
            "decoder_intermediate_size": task.decoder_ffn_size,
            "decoder_num_attention_heads": task.decoder_num_heads,
            "decoder_num_hidden_layers": task.decoder_num_layers,
            "mask_ratio": task.mask_ratio,
            "norm_pix_loss": task.norm_pix,
        }
    return settings | {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def _preprocessor(config: RunConfig) -> dict[str, Any]:
    height, width = config.data.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3 if config.data.interpolation.value == "bicubic" else 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": config.data.mean,
        "image_std": config.data.std,
    }


def _card(config: RunConfig, checkpoint: Path) -> str:
    state = json.loads((checkpoint / "state.json").read_text())
    results = "\n".join(f"- {name}: {value}" for name, value in state["metrics"].items()) or "- none"
    model = config.model
    return (
        f"---\nlibrary_name: transformers\ntags: [megavit, vit]\n---\n\n# {config.run.name}\n\n"
        f"{model.num_layers} layers of {model.hidden_size}, patch {model.patch_size}, trained with megavit for "
        f"{state['step']} steps on {state['consumed_samples']:,} images of `data.source={config.data.source}`.\n\n"
        f"Validation at that step:\n\n{results}\n"
    )
