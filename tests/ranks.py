"""What distributed tests run on every rank: the product's own trainer."""

import json
from pathlib import Path


def train(overrides: list[str], *, evaluates: bool = False) -> dict:
    """Train through the real Trainer; losses and norms of each step, whole weights in the plain form on rank 0."""
    from megavit.checkpoint.param_mapping import to_timm
    from megavit.checkpoint.shards import gather_full_state_dict
    from megavit.config.compose import compose
    from megavit.config.validate import validate
    from megavit.model.vit import parameter_names
    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer
    from tests.reference import dims_of

    config = compose(overrides)
    validate(config, world_size_from_environment())
    # Half of a short test's time would go into the validation set.
    trainer = Trainer(config, evaluates=evaluates, saves=False)
    code = trainer.run()
    parameters = {name: value for chunk in trainer.chunks.values() for name, value in parameter_names(chunk).items()}
    averages = None
    if trainer.average is not None:
        with trainer.average.applied():
            averages = gather_full_state_dict(parameters, trainer.layout)
    full = gather_full_state_dict(parameters, trainer.layout)
    if full is None:
        return {}
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if row["split"] == "train"]
    return {
        "code": code,
        "losses": [row["loss"] for row in training],
        "grad_norms": [row["grad_norm"] for row in training],
        "validation": [row for row in rows if row["split"] == "val"],
        "weights": {name: weight.clone() for name, weight in to_timm(full, dims_of(config)).items()},
        "averages": averages and {name: value.clone() for name, value in to_timm(averages, dims_of(config)).items()},
    }


def train_and_evaluate(overrides: list[str]) -> dict:
    return train(overrides, evaluates=True)


def train_evaluate_and_keep(overrides: list[str]) -> dict:
    return train_and_keep(overrides, evaluates=True)


def resume(*runs: list[str]) -> dict:
    """Train one run after the other in one world; the state of the last and all that was logged."""
    result = {}
    for overrides in runs:
        result = train_and_keep(overrides)
    return result


def train_and_keep(overrides: list[str], *, evaluates: bool = False) -> dict:
    """Train and save; this rank's weights and optimizer state, every logged loss, the samples that were due."""
    from megavit.config.compose import compose
    from megavit.config.validate import validate
    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer

    config = compose(overrides)
    validate(config, world_size_from_environment())
    trainer = Trainer(config, evaluates=evaluates)
    due = []
    original = trainer.task.forward

    def forward(batch, model):
        if batch is not None:
            due.append([key.sample_id for key in batch.keys])
        return original(batch, model)

    trainer.task.forward = forward
    code = trainer.run()
    optimizer = trainer.optimizer.chained_optimizers[0].optimizer
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return {
        "code": code,
        "weights": {
            f"{index}.{name}": value.detach().clone()
            for index, chunk in enumerate(trainer.chunks.values())
            for name, value in chunk.state_dict().items()
            if value is not None
        },
        "optimizer": [
            {key: value.clone() for key, value in optimizer.state[param].items()}
            for group in optimizer.param_groups
            for param in group["params"]
        ],
        "averages": [
            value.clone()
            for weights in (trainer.average.weights if trainer.average else {}).values()
            for value in weights.values()
        ],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        "losses": {row["step"]: row["loss"] for row in rows if row["split"] == "train"},
        "validation": {row["step"]: row for row in rows if row["split"] == "val"},
        "due": due,
    }


def dtypes(overrides: list[str]) -> dict:
    """The number formats of weights, fp32 masters, Adam's moments and gradients."""
    from megavit.config.compose import compose
    from megavit.train.trainer import Trainer

    trainer = Trainer(compose(overrides), evaluates=False, saves=False)
    trainer.run()
    optimizer = trainer.optimizer.chained_optimizers[0].optimizer
    masters = [param for group in optimizer.param_groups for param in group["params"]]
    weights = [param for chunk in trainer.chunks.values() for param in chunk.parameters()]
    return {
        "weights": {weight.dtype for weight in weights},
        "masters": {master.dtype for master in masters},
        "moments": {moment.dtype for master in masters for moment in optimizer.state[master].values()},
        "gradients": {weight.main_grad.dtype for weight in weights},
    }


def masks(overrides: list[str]) -> dict:
    """Train and save; the patches kept of every sample that was due, by (sample, epoch), on this rank, and losses."""
    from megavit.config.compose import compose
    from megavit.config.validate import validate
    from megavit.parallel.layout import world_size_from_environment
    from megavit.train.trainer import Trainer

    config = compose(overrides)
    validate(config, world_size_from_environment())
    trainer = Trainer(config, evaluates=False)
    original, kept = trainer.task.keep, {}

    def keep(batch):
        rows = original(batch)
        kept.update(
            {(key.sample_id, key.epoch): tuple(row) for key, row in zip(batch.keys, rows.tolist(), strict=True)}
        )
        return rows

    trainer.task.keep = keep
    trainer.run()
    rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    return {"kept": kept, "losses": {row["step"]: row["loss"] for row in rows if row["split"] == "train"}}
