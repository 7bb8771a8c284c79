"""Whatever is typed: a run's configuration or one line of error, and nothing is run."""

import sys
from enum import Enum

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.saved import from_yaml, to_yaml
from megavit.config.search_path import choices, groups
from megavit.config.settings import flatten
from megavit.config.validate import validate
from megavit.errors import ConfigError

KEYS = list(flatten(ExperimentConfig()))
# What would run code, read the environment or reach into the configuration, if anything here let it.
HOSTILE = [
    "{_target_: os.system, _args_: [id]}",
    "'{_target_: subprocess.run}'",
    "os.system",
    "builtins:eval",
    "os:system",
    "${oc.env:HOME}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${oc.decode:'1'}",
    "${oc.create:{a:1}}",
    "${oc.select:run.seed}",
    "${run.name}",
    "${eval:1+1}",
    "${hydra:runtime.cwd}",
    "${",
    "!!python/object/apply:os.system [id]",
    '"!!python/object/apply:os.system [id]"',
    "!!python/name:os.system",
    "range(1,5)",
    "choice(1,2)",
    "sort(3,1)",
    "glob(*)",
    "1,2,3",
]
PLAIN = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "false", "''", "[]", "{}", "[1,2]", "[1,[2]]", "{a: 1}"]),
    st.sampled_from(["fp32", "bf16_o2", "..", "a/b"]),
    st.text(max_size=12),
    st.text("${}[]():,=~@!'\"\\ ", max_size=8),
    st.sampled_from(
        [
            "adamw",
            "sgd",
            "nowhere.yaml",
            "[digits,nowhere.yaml]",
            "[digits,digits_mae]",
            "mae",
            "vit_b16",
            "digits",
            "digits_mae",
            "nowhere",
            "default",
        ]
    ),
)
NAMES = st.one_of(
    st.sampled_from(KEYS),
    st.sampled_from([*groups(), *KEYS]).map(lambda key: key[:-1]),
    st.sampled_from(groups()),
    st.sampled_from(
        [
            "run",
            "train",
            "hydra",
            "hydra.run.dir",
            "hydra.searchpath",
            "--config-dir",
            "--config-name",
            "_target_",
            "optim._target_",
            "defaults",
        ]
    ),
    st.text(max_size=8),
)
FORMS = st.sampled_from(["{}={}"] * 8 + ["+{}={}", "++{}={}", "~{}={}", "~{}", "{}", "{}@x={}", "{}="])
CHAOS = st.builds(
    lambda form, name, value: form.format(name, value), FORMS, NAMES, st.one_of(PLAIN, st.sampled_from(HOSTILE))
)
# What might be meant: a key that exists, a value of some plausible type.
MEANT = st.one_of(
    st.integers(-2, 300).map(str),
    st.floats(-2, 2).map(lambda value: f"{value:.3g}"),
    st.sampled_from(
        ["null", "true", "false", "nan", "inf", "0", "1", "10000000000000000000000", "1e400", "[]", "[8,8]"]
    ),
    st.sampled_from(["[0,0]", "[1.5]", "[0.1,0.9]", "[a,b]", "[null]", "[[8]]", "[-1,8,8]", "digits", "adamw", "mae"]),
    st.sampled_from(
        [
            member.value
            for setting in flatten(ExperimentConfig()).values()
            if isinstance(setting, Enum)
            for member in type(setting)
        ]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="'\\\\"), min_size=1, max_size=6).map(
        lambda text: f"'{text}'"
    ),
)
SETTINGS = st.builds("{}={}".format, st.sampled_from(KEYS), MEANT)
CHOICES = st.sampled_from([f"{group}={choice}" for group in groups() for choice in choices(group)])
OVERRIDES = st.one_of(SETTINGS, SETTINGS, SETTINGS, CHOICES, CHAOS)

_ran: list[str] = []
_watching = [False]


def _watch(event: str, arguments: tuple) -> None:
    if _watching[0] and event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class"):
        _ran.append(f"{event} {arguments}")


sys.addaudithook(_watch)


def compose_and_check(overrides: list[str], world_size: int) -> None:
    _watching[0] = True
    try:
        config = compose(overrides)
        validate(config, world_size)
        # What goes through goes into the run's folder, and is read back from there.
        assert to_yaml(from_yaml(to_yaml(config))) == to_yaml(config)
    except ConfigError as error:
        refused = str(error)
    else:
        refused = None
    finally:
        _watching[0] = False
    assert refused is None or (refused and "Traceback" not in refused)
    assert refused is None or "\n" not in refused or "\n" in "".join(overrides)
    assert not _ran


# Each example is a few settings, so that wrong ones meet.
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OVERRIDES, min_size=1, max_size=4), st.sampled_from([1, 2, 3, 4, 8]))
def test_settings_at_random_are_taken_or_refused_in_one_message(overrides, world_size):
    compose_and_check(overrides, world_size)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OVERRIDES, min_size=1, max_size=4), st.sampled_from([1, 2, 3, 4, 8]))
def test_ten_thousand_lines_of_settings_at_random(overrides, world_size):
    compose_and_check(overrides, world_size)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("key", ["run.name", "data.source", "optim.lr"])
def test_what_would_run_code_runs_none(key, value):
    compose_and_check([f"{key}={value}"], 1)


@pytest.mark.parametrize(
    "text",
    [
        "run: !!python/object/apply:os.system [id]",
        "run: {_target_: os.system}",
        "run: {name: '${oc.env:HOME}'}",
        "data: {source: 'os:system'}",
        "run: {seed: three}",
        "run: [1, 2]",
        "- 1",
        "run: {",
        "\x00",
        "just words",
    ],
)
def test_a_strangers_run_yaml_is_refused_or_harmless(text):
    _watching[0] = True
    try:
        with pytest.raises(ConfigError):
            validate(from_yaml(text), 1)
    finally:
        _watching[0] = False
    assert not _ran
