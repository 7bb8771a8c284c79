"""Add a new optimizer, Lion: one class, and a row of the registry or, as a plug-in, no change of the repository."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.saved import from_yaml, to_yaml
from megavit.config.validate import validate
from megavit.errors import ConfigError
from megavit.inference.trained_run import read_config
from megavit.optim.config import OptimConfig
from megavit.optim.optimizer import find_spec, state_bytes
from megavit.optim.plugin import inspect_plugin
from megavit.optim.registry import OPTIMIZERS, OptimizerSpec
from megavit.train.summary import describe_optimizer
from tests import ranks, reference
from tests.distributed import run_ranks
from tests.reference import SMALL, decays
from tests.test_readme import ROOT, blocks
from tests.train.test_resume import assert_bit_equal

PLACE = "tests.optim.test_new_optimizer:Lion"
ROW = OptimizerSpec(build=PLACE, settings=frozenset({"betas"}), state_keys=("exp_avg",))
AS_ROW = ["optim.name=lion", "optim.implementation=null", "optim.eps=null", "optim.betas=[0.9,0.99]"]
AS_PLUGIN = [f"optim.name={PLACE}", "optim.betas=[0.9,0.99]"]
STEPS = [*SMALL, "train.steps=8", "optim.lr=3e-4"]


class Adaptive(torch.optim.SGD):
    """A step size that is learned and kept in the parameter groups, as Prodigy's."""

    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            group["scale"] = group.get("scale", 1.0) * 1.1
            group["num_calls"] = group.get("num_calls", 0) + 1
        super().step(closure)


class Lion(torch.optim.Optimizer):
    """Lion.

    Source: arXiv 2302.06675, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                average = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                update = average.lerp(param.grad, 1 - beta1).sign_()
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                average.lerp_(param.grad, 1 - beta2)


class Factored(Lion):
    def step(self, closure=None):
        (param,) = self.param_groups[0]["params"]
        self.state[param]["rows"] = param.new_zeros(param.shape[0])


class NoDecay(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))


@pytest.fixture
def row(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "lion", ROW)


def with_row(function: str, *arguments: Any) -> dict:
    """Run a function of `tests/ranks.py` with the row, on a rank."""
    OPTIMIZERS["lion"] = ROW
    try:
        return getattr(ranks, function)(*arguments)
    finally:
        del OPTIMIZERS["lion"]


def test_lion_takes_the_step_of_the_paper():
    torch.manual_seed(0)
    weight, gradients = torch.randn(4, 3), torch.randn(3, 4, 3)
    param = torch.nn.Parameter(weight.clone())
    optimizer = Lion([param], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    momentum = torch.zeros(4, 3)
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
        weight = weight - 0.01 * (torch.sign(0.9 * momentum + 0.1 * gradient) + 0.1 * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    # Measured: 6e-8.
    torch.testing.assert_close(param.detach(), weight, atol=1e-6, rtol=0)


def serial_lion(model: torch.nn.Module, config: ExperimentConfig) -> Lion:
    groups = [
        {"params": [weight], "weight_decay": config.optim.weight_decay if decays(name, weight) else 0.0, "share": 1.0}
        for name, weight in model.named_parameters()
    ]
    return Lion(groups, betas=tuple(config.optim.betas))


@pytest.mark.parametrize(("world", "rule"), [(1, AS_ROW), (2, AS_PLUGIN)], ids=["row", "plug-in, DP 2"])
def test_a_run_takes_the_steps_of_the_serial_computation(world, rule, tmp_path, row, monkeypatch, figure):
    monkeypatch.setattr(reference, "make_optimizer", serial_lion)
    keys = [*STEPS, *rule, f"run.dir={tmp_path}"]
    got = run_ranks(with_row, world, "train", keys)[0]
    want = reference.train_torch(keys)
    worst = max(abs(a - b) for a, b in zip(got["losses"], want.losses, strict=True))
    figure(f"Lion, losses against the serial computation, {world} ranks: {worst:.1e}")
    # Measured: 2.4e-7.
    assert worst <= 1e-6


@pytest.mark.parametrize(
    ("world", "rule"),
    [
        pytest.param(1, AS_ROW, marks=pytest.mark.slow),
        (2, AS_ROW),
        pytest.param(2, AS_PLUGIN, marks=pytest.mark.slow),
        (2, [*AS_PLUGIN, "train.precision=bf16_o2"]),
    ],
)
def test_lion_resumes_bit_equal(world, rule, tmp_path):
    keys = [*STEPS, *rule]
    want = run_ranks(with_row, world, "train_and_keep", [*keys, f"run.dir={tmp_path}/full"])
    parts = [*keys, f"run.dir={tmp_path}/parts"]
    got = run_ranks(with_row, world, "resume", [*parts, "train.stop_at=3"], parts)
    for mine, full in zip(got, want, strict=True):
        assert_bit_equal(mine, full)
        assert {key for state in mine["optimizer"] for key in state} == {"exp_avg"}


def test_inspecting_a_plugin_gives_the_same_row():
    found = inspect_plugin(compose(AS_PLUGIN).optim)
    assert found == ROW


def test_the_summary_counts_lions_state(row):
    for rule, name in ((AS_ROW, "lion"), (AS_PLUGIN, PLACE)):
        config = compose(rule).optim
        assert state_bytes(config) == 4
        assert describe_optimizer(config, num_trained=7, num_weights=7, bf16=False, dp=2) == (
            f"optimizer {name}: 4 bytes of state for each weight, on every data-parallel rank; trains all 7 weights"
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*AS_ROW, "optim.eps=1e-8"], "optim.eps=1e-08 would be ignored by optim.name=lion"),
        ([*AS_ROW, "optim.betas=null"], "optim.name=lion needs optim.betas"),
        (["optim.name=lino", *AS_ROW[1:]], r"optim.name=lino is not known; did you mean lion\?"),
        (["optim.name=zzz", *AS_ROW[1:]], "known: adamw, sgd, lars, lion, or package.module:Class"),
        ([*AS_ROW, "parallel.overlap_param_gather=true"], "optim.name=lion does not shard them"),
        ([*AS_PLUGIN, "parallel.overlap_param_gather=true"], "Lion does not shard them"),
        (["optim.name=os:system"], "os is in Python's standard library"),
        (["optim.name=nobody:Lion"], "nobody is neither an installed package"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(overrides, message, row):
    with pytest.raises(ConfigError, match=message):
        validate(compose(["parallel.overlap_grad_reduce=true", "run.ranks=2", "train.global_batch=64", *overrides]), 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*AS_PLUGIN, "optim.eps=1e-8"], "optim.eps=1e-08 would be ignored by optim.name=tests.optim.*Lion"),
        (["optim.name=tests.optim.test_new_optimizer:NoDecay"], "takes no argument weight_decay"),
        (["optim.name=tests.optim.test_new_optimizer:Factored"], r"a state rows of shape \(3,\)"),
        (["optim.name=tests.optim.test_new_optimizer:Tiger"], "has no Tiger"),
        (["optim.name=tests.optim.test_new_optimizer:Adaptive"], "changes num_calls, scale of its parameter groups"),
        (["optim.name=torch.optim:NAdam", "optim.betas=[0.9,0.99]"], "mu_product"),
    ],
)
def test_a_plugin_that_does_not_fit_is_refused_before_the_first_step(overrides, message):
    config = compose(overrides)
    validate(config, 1)
    with pytest.raises(ConfigError, match=message):
        find_spec(config.optim)


def test_a_plugins_class_keeps_its_defaults_where_nothing_is_typed():
    config = compose([f"optim.name={PLACE}"]).optim
    assert (config.betas, config.eps, config.implementation) == (None, None, None)
    assert config.keywords({"betas"}) == {}


def test_optimizers_of_torch_need_no_file():
    found = inspect_plugin(compose(["optim.name=torch.optim:RMSprop", "optim.momentum=0.9"]).optim)
    assert found.settings == {"momentum", "eps"}
    assert found.state_keys == ("momentum_buffer", "square_avg")


def test_a_count_of_steps_is_resumed_too(tmp_path):
    keys = [*STEPS, "optim.name=torch.optim:RAdam"]
    want = run_ranks(ranks.train_and_keep, 2, [*keys, f"run.dir={tmp_path}/full"])
    parts = [*keys, f"run.dir={tmp_path}/parts"]
    got = run_ranks(ranks.resume, 2, [*parts, "train.stop_at=3"], parts)
    for mine, full in zip(got, want, strict=True):
        assert_bit_equal(mine, full)


@pytest.mark.parametrize("more", [[], pytest.param(["train.precision=bf16_o2"], marks=pytest.mark.slow)])
def test_a_count_of_steps_is_saved_by_a_rank_that_trains_weights(more, tmp_path, figure):
    # On two stages the first rank trains nothing.
    frozen = "optim.freeze=[patch_embed.*,cls_token,pos_embed,blocks.0.*,blocks.1.*]"
    keys = [*STEPS, "optim.name=torch.optim:RAdam", frozen, *more]
    want = run_ranks(ranks.train_and_keep, 1, [*keys, f"run.dir={tmp_path}/full"])[0]
    parts = [*keys, f"run.dir={tmp_path}/parts"]
    run_ranks(ranks.train_and_keep, 2, [*parts, "parallel.pp=2", "train.stop_at=3"])
    first, last = run_ranks(ranks.train_and_keep, 2, [*parts, "parallel.pp=2", "train.stop_at=6"])
    assert not first["optimizer"]
    assert {float(state["step"]) for state in last["optimizer"]} == {6}
    (got,) = run_ranks(ranks.train_and_keep, 1, parts)
    assert {float(state["step"]) for state in got["optimizer"]} == {8}
    worst = max(abs(got["losses"][step] - loss) for step, loss in want["losses"].items())
    figure(f"RAdam, PP 2 with a frozen first stage, then one rank, {more}: largest |Δloss| {worst:.1e}")
    assert worst <= (5e-3 if more else 1e-6)


def test_evaluating_a_run_does_not_import_its_optimizer(tmp_path):
    config = compose(["optim.name=torch.optim:RMSprop", "optim.momentum=0.9"])
    text = to_yaml(config).replace("torch.optim:RMSprop", "somebodys:Code")
    assert from_yaml(text).optim.name == "somebodys:Code"
    (tmp_path / "run.yaml").write_text(text)
    found = read_config(tmp_path)
    assert found.optim.name == OptimConfig().name
    validate(found, 1)


def test_the_guides_optimizer_is_the_one_tested_here():
    (code,) = blocks("docs/extending.md", "An optimizer", "python")
    guide: dict[str, Any] = {}
    exec(code, guide)
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2)]
    optimizers = [
        rule([weight], lr=0.01, weight_decay=0.1) for rule, weight in zip((guide["Lion"], Lion), weights, strict=True)
    ]
    for gradient in torch.randn(3, 6, generator=torch.Generator().manual_seed(0)):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(*weights)
    (command,) = blocks("docs/extending.md", "An optimizer", "bash")
    assert compose(command.replace("my_rules:Lion", PLACE).split()[3:]).optim.name == PLACE
    text = (ROOT / "docs/extending.md").read_text()
    row = re.search(r'`"lion": (OptimizerSpec\(.*\))`', text).group(1)
    assert replace(eval(row), build=PLACE) == ROW
