"""`megavit evaluate from=RUN`: a checkpoint of any layout, in any layout, over the whole validation set."""

import csv
import json
from functools import partial

from torch import Tensor

from megavit.bad_samples import BadSamples
from megavit.data.loader import Loader
from megavit.data.opening import open_source
from megavit.engine import Engine, prepare_task
from megavit.errors import ConfigError
from megavit.metrics.pictures import draw_confusion
from megavit.parallel.layout import world_size_from_environment
from megavit.search import Weights
from megavit.trained import open_run, prepare


def evaluate(arguments: list[str]) -> int:
    """Evaluate as one rank; the first leaves the results in `RUN/evaluation/`."""
    world_size = world_size_from_environment()
    config, weights = prepare("evaluate", arguments, world_size=world_size)
    source = open_source(config.data, "val")
    trained = open_run(config, weights, num_classes=len(source.classes))
    network, layout = trained.network, trained.layout
    task, micro_batch = network.task, config.micro_batch(world_size)

    loader = partial(
        Loader,
        config=config.data,
        layout=layout,
        needs=task.needs,
        micro_batch=micro_batch,
        seed=config.run.seed,
    )
    if task.baseline_samples:
        prepare_task(task, loader, open_source(config.data, "train"), seed=config.run.seed)
    engine = Engine(network, list(network.chunks.values()), layout=layout, micro_batch=micro_batch)
    shown = loader(source, train=False)
    totals = engine.score(shown)
    bad_samples = BadSamples(shown, "val", run_dir=weights.checkpoint.parent.parent)
    told = bad_samples.collect(0)
    if layout.rank == 0:
        print(*told, sep="\n", end="\n" if told else "")
    if bad_samples.too_many is not None:
        raise ConfigError(bad_samples.too_many)
    if layout.rank == 0:
        metrics = {**task.metrics({name: float(totals[name]) for name in task.sums}), **bad_samples.metrics}
        _report(totals, metrics, source.classes, weights)
    return 0


def _report(totals: dict[str, Tensor], metrics: dict[str, float], classes: tuple[str, ...], weights: Weights) -> None:
    checkpoint = weights.checkpoint
    folder = checkpoint.parent.parent / "evaluation" / f"{checkpoint.name}{'_ema' if weights.averaged else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    count = int(totals["count"])
    results: dict[str, object] = {"checkpoint": str(weights), "count": count, **metrics}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    for name in {"top5", "hit5"} & totals.keys():
        results[name] = float(totals[name]) / count
        shown += f"  {name} {results[name]:.4f}"
    if "confusion" in totals:
        confusion = totals["confusion"].long()
        per_class = (confusion.diagonal() / confusion.sum(dim=1).clamp(min=1)).tolist()
        results["top1_per_class"] = dict(zip(classes, per_class, strict=True))
        with (folder / "confusion.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["label \\ guess", *classes])
            writer.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
        draw_confusion(confusion, classes=classes, path=folder / "confusion.png")
    (folder / "metrics.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"{weights}: {count} images  {shown}; {folder} has it all")
