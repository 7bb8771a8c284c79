"""The sweep syntax: which runs a command line stands for, and what is refused."""

import pytest

from megavit.config.settings import run_types
from megavit.config.sweep import Interval, expand, read_sweep, read_swept, split_sweep
from megavit.errors import ConfigError

VALUES = {
    "optim.lr=1e-3,3e-3": ["0.001", "0.003"],
    "optim.lr=choice(1e-3,3e-3)": ["0.001", "0.003"],
    "optim.lr=tag(coarse,choice(1e-3,3e-3))": ["0.001", "0.003"],
    "optim.lr=sort(3e-3,1e-3)": ["0.001", "0.003"],
    "run.seed=range(1,4)": ["1", "2", "3"],
    "run.seed=range(4)": ["0", "1", "2", "3"],
    "run.seed=sort(range(1,4),reverse=true)": ["3", "2", "1"],
    "optim.weight_decay=range(0,0.3,0.1)": ["0.0", "0.1", "0.2"],
    "optim.weight_decay=float(range(1,3))": ["1.0", "2.0"],
    "data.mean=[0.5],[0.4]": ["[0.5]", "[0.4]"],
    "model=vit_ti16,vit_s16": ["vit_ti16", "vit_s16"],
    "run.name=a,'b,c'": ["a", "'b,c'"],
    "run.name=choice(a)": ["a"],
    # Of these the value is one.
    "data.mean=[0.5,0.4]": ["[0.5,0.4]"],
    "--config-dir=a,b": ["a,b"],
    "hydra.searchpath=[file://a,file://b]": ["[file://a,file://b]"],
}

REFUSED = {
    "optim.lr=glob(*)": "glob() is not read here; list the choices, optim.lr=a,b",
    "model=glob(vit_*)": "glob() is not read here",
    "optim.lr=1,1": "names a value twice",
    "optim.lr=range(3,1)": "has no value: its start is not before its end",
    "optim.lr=range(1,2,0)": "has a step of 0",
    "run.name=sort(a,b)": "a text setting takes a,b or choice(a,b), and not sort()",
    "run.name=a,,b": "an empty value between two commas",
    "optim.lr=interval(1,0)": "1.0 is not below 0.0",
    "optim.lr=tag(log,interval(0,1))": "a logarithmic interval begins above 0",
    "optim.lr=tag(fast,interval(0,1))": "the tag fast has no meaning here",
    "optim.lr=choice(": "cannot be read",
}


@pytest.mark.parametrize("typed", VALUES)
def test_a_setting_has_the_values_that_hydra_gives_it(typed):
    key = typed.partition("=")[0]
    assert list(read_swept(typed, run_types()).values) == [f"{key}={value}" for value in VALUES[typed]]


@pytest.mark.parametrize("typed", REFUSED)
def test_a_sweep_that_cannot_be_read_is_refused_in_one_line(typed):
    with pytest.raises(ConfigError) as refused:
        read_swept(typed, run_types())
    assert REFUSED[typed] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_shuffle_gives_the_same_order_each_time_and_all_values():
    first, second = (read_swept("run.seed=shuffle(range(20))", run_types()).values for _ in range(2))
    assert first == second != read_swept("run.seed=range(20)", run_types()).values
    assert sorted(first) == sorted(read_swept("run.seed=range(20)", run_types()).values)


def test_an_interval_keeps_its_type_and_scale():
    def read(value: str) -> Interval | None:
        return read_swept(f"optim.lr={value}", run_types()).interval

    assert read("interval(0,1)") == Interval(0.0, 1.0, is_integer=False, is_log=False)
    assert read("int(interval(1,9))") == Interval(1, 9, is_integer=True, is_log=False)
    assert read("tag(log,interval(1e-4,1e-1))") == Interval(1e-4, 1e-1, is_integer=False, is_log=True)


def test_a_grid_refuses_an_interval_and_names_the_sampler():
    with pytest.raises(ConfigError, match=r"is an interval.*sweep\.sampler=optuna sweep\.trials=20"):
        expand(read_sweep(["optim.lr=interval(0,1)"]))


def test_runs_are_named_by_what_differs_and_a_long_name_is_shortened():
    runs = expand(read_sweep(["optim.lr=1e-3,3e-3", "train.steps=5", "model=vit_digits,vit_s16"]))
    assert [run.name for run in runs] == [
        f"lr_{lr}-model_{model}" for lr in ("0.001", "0.003") for model in ("vit_digits", "vit_s16")
    ]
    assert runs[0].varied == {"optim.lr": "0.001", "model": "vit_digits"}
    long = expand(read_sweep([f"data.path={'a' * 300},{'a' * 299}b"]))
    assert all(len(run.name) <= 200 for run in long)
    assert long[0].name != long[1].name


def test_of_a_setting_that_is_given_twice_the_last_counts_as_in_a_run():
    runs = expand(read_sweep(["optim.lr=3e-3", "optim.lr=1e-3,2e-3"]))
    assert [(run.name, run.overrides) for run in runs] == [
        (f"lr_{lr}", [f"optim.lr={lr}"]) for lr in ("0.001", "0.002")
    ]
    with pytest.raises(ConfigError, match="needs a setting with several values"):
        read_sweep(["optim.lr=1e-3,2e-3", "optim.lr=3e-3"])


def test_more_combinations_than_a_sweep_holds_are_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match="200 × 100 combinations are more than the 10000 runs of a sweep"):
        split_sweep(["run.seed=range(200)", "train.steps=range(1,101)"])
