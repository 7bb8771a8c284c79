"""Print what a run or a checkpoint contains, without reading its weights (`megavit inspect from=PATH`)."""

from dataclasses import dataclass
from pathlib import Path

from megavit.checkpoint.find import find_checkpoint
from megavit.checkpoint.manager import CheckpointManager
from megavit.checkpoint.state import read_state
from megavit.cli.arguments import argument
from megavit.config.saved import from_yaml
from megavit.parallel.config import ParallelConfig


@dataclass(frozen=True)
class InspectArgs:
    """The command's arguments.

    Attributes:
        from_: a run's folder, or one of its checkpoints.
    """

    from_: Path = argument(form="PATH")


def inspect_run(args: InspectArgs) -> int:
    """Print a run's model, step, samples, layout at the save, size on disk and last metrics."""
    checkpoint = find_checkpoint(args.from_)
    config, state = from_yaml((checkpoint / "run.yaml").read_text()), read_state(checkpoint)
    model, files = config.model, [path for path in checkpoint.rglob("*") if path.is_file()]
    rows = {
        "checkpoint": checkpoint,
        "task": config.task.name,
        "model": f"{model.num_layers} layers of {model.hidden_size}, MLP {model.ffn_size}, {model.num_heads} heads, "
        f"patch {model.patch_size}, {model.class_tokens} class tokens",
        "images": f"{config.data.image_size} × {config.data.channels} from {config.data.source}",
        "classes": "none"
        if not state.classes
        else f"{len(state.classes)}: {', '.join(state.classes[:10])}{' …' if len(state.classes) > 10 else ''}",
        "step": f"{state.step} of {config.train.steps or f'{config.train.epochs:g} epochs'}",
        "samples": f"{state.consumed_samples:,}",
        "precision": config.train.precision.value,
        "layout": _layout(config.parallel),
        "size": f"{sum(path.stat().st_size for path in files):,} bytes in {len(files)} files",
        "validation": _describe(state.metrics) or "none yet",
        "best": _best(checkpoint),
    }
    for name, value in rows.items():
        print(f"{name:<11} {value}")
    return 0


def _best(checkpoint: Path) -> str:
    best = CheckpointManager(checkpoint.parent).best()
    if best is None:
        return "none yet"
    return f"{best.name}  {_describe(read_state(best).metrics)}"


def _describe(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}".removesuffix(".0000") for name, value in metrics.items())


def _layout(parallel: ParallelConfig) -> str:
    sequence = " + SP" if parallel.sequence_parallel else ""
    virtual = f" (VPP {parallel.vpp})" if parallel.vpp > 1 else ""
    return f"TP {parallel.tp}{sequence} × PP {parallel.pp}{virtual}; loads into any other"
