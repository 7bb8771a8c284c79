"""Text settings are the text as typed, from the command line to the started ranks and back from config.yaml."""

import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.distributed.elastic.utils.api import macros

from megavit.cli.arguments import parse
from megavit.cli.features import FeaturesArgs
from megavit.cli.predict import PredictArgs
from megavit.cluster.azureml_config import AzureMLConfig
from megavit.cluster.config import LocalConfig, SlurmConfig
from megavit.cluster.job import plan_job
from megavit.cluster.kubernetes_config import KubernetesConfig
from megavit.cluster.registry import get_backend
from megavit.config.compose import compose
from megavit.config.experiment import ExperimentConfig
from megavit.config.overrides import read_setting, read_text, types_of, write_text
from megavit.config.saved import from_yaml, merge, to_yaml
from megavit.config.settings import flatten, run_types
from megavit.config.sweep import split_sweep
from megavit.data.sources.open import open_source
from megavit.errors import ConfigError
from megavit.runtime.workers import literal

# Any text but the task's name, which is one of a table.
TEXTS = [key for key, kind in run_types().items() if kind in (str, str | None) and key != "task.name"]
LISTS = [key for key, kind in run_types().items() if kind == list[str] | None]
# What YAML 1.1, Hydra or Python would take for something else.
LIKE_OTHERS = [
    *("1.10", "2024_06_01", "1e3", "true", "False", "+5", "-3", "0x1F", "1:30", "2024-06-01", "yes", "off", ".inf"),
    *("nan", "1_1", "007", "-", "1.", "a,b", "a=b", "a#b", "a (1)", "x;y", "it's", "Übung", "sort(b,a)", "range(1,3)"),
    *("a: b", "$HOME", "$$", "$local_rank", "a\\,b", "*", "&a", "!b", "%", "{a: 1}", '"a" and "b"', " a ", "[a"),
]
# All but another setting's value, OmegaConf's word for a missing value, and the line break that YAML does not keep.
ANY = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=12).filter(
    lambda text: "${" not in text and text != "???"
)


def in_a_rank(typed: list[str]) -> list[str]:
    """The words as torch's agent hands them to a rank."""
    return macros.substitute(literal(typed), "0")


def check_any_text(texts: list[str], items: list[str]) -> None:
    quoted = ",".join(QuotedString(item, Quote.single).with_quotes() for item in items)
    wanted = dict(zip(TEXTS, texts, strict=True)) | dict.fromkeys(LISTS, items)
    typed = [write_text(key, text) for key, text in zip(TEXTS, texts, strict=True)]
    typed += [f"{key}=[{quoted}]" for key in LISTS]
    # Hydra itself reads what is written in quotes, and we read what it writes.
    for text in texts:
        assert OverridesParser.create().parse_override(write_text("x", f"$ {text}")).value() == f"$ {text}"
        assert read_text(QuotedString(text, Quote.double).with_quotes()) == text
    composed = compose(in_a_rank(typed))
    for config in (composed, from_yaml(to_yaml(composed)), merge(ExperimentConfig(), typed)):
        found = flatten(config)
        assert {key: found[key] for key in wanted} == wanted


MANY = st.lists(ANY, min_size=len(TEXTS), max_size=len(TEXTS))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(MANY, st.lists(ANY, max_size=4))
def test_any_text_reaches_every_text_setting_and_comes_back_from_yaml(texts, items):
    check_any_text(texts, items)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=500, deadline=None)
@given(MANY, st.lists(ANY, max_size=4))
def test_five_hundred_texts_reach_every_text_setting(texts, items):
    check_any_text(texts, items)


@pytest.mark.parametrize("start", range(0, len(LIKE_OTHERS), len(TEXTS)))
def test_text_that_looks_like_something_else_needs_no_quotes(start):
    texts = (LIKE_OTHERS * 2)[start : start + len(TEXTS)]
    items = [text for text in texts if not re.search(r"[,\[\"]", text)]
    wanted = dict(zip(TEXTS, texts, strict=True)) | {key: [item.strip() for item in items] for key in LISTS}
    typed = [f"{key}={text}" for key, text in zip(TEXTS, texts, strict=True)]
    composed = compose(in_a_rank([*typed, *(f"{key}=[{', '.join(items)}]" for key in LISTS)]))
    for config in (composed, from_yaml(to_yaml(composed))):
        found = flatten(config)
        assert {key: found[key] for key in wanted} == wanted


def value(typed: str) -> object:
    return read_setting(typed, run_types()).value


def test_quotes_null_and_the_home_directory_keep_their_meaning(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for typed, wanted in {
        "data.path='\"~/a, b\"'": '"~/a, b"',
        'data.path="~/a, b"': "~/a, b",
        'data.path="a\\"b\\\\"': 'a"b\\',
        'data.path="null"': "null",
        "data.path=null": None,
        "data.path=": "",
        "data.path=~": "/home/me",
        "data.path=~/imgs": "/home/me/imgs",
        "data.path=a~/b": "a~/b",
        "init_from=ema:~/runs/a": "ema:/home/me/runs/a",
        "data.classes=null": None,
        "data.classes=[]": [],
        "data.classes=[1_1,1_2]": ["1_1", "1_2"],
        "data.classes=[true, false]": ["true", "false"],
        "data.classes=[\"a b\",'c,d',e f,null]": ["a b", "c,d", "e f", "null"],
        "optim.freeze=[blocks.[0-3].*,head.*]": ["blocks.[0-3].*", "head.*"],
    }.items():
        assert value(typed) == wanted, typed


def test_numbers_truth_values_and_words_keep_hydras_grammar():
    for typed, wanted in {
        "optim.lr=1_0e-1": 1.0,
        "train.steps=+5": 5,
        "data.flip=TRUE": True,
        "data.mean=[.5, 1e-1]": [0.5, 0.1],
        "train.precision=fp32": "fp32",
    }.items():
        assert value(typed) == wanted, typed


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("run.name=null", "run.name=null: this setting is never null; the word itself goes in quotes"),
        ("data.classes=a,b", "'data.classes=a,b' is no list: it goes in brackets, data.classes=[a,b]"),
        ("data.classes=[a,,b]", "holds an empty item"),
        ("data.classes=[a],[b]", "an item with a bracket of its own goes in quotes"),
        ("train.steps=1e3", "could not be converted to Integer (train.steps=1e3)"),
        ("run.name=a\x85b", "U+0085"),
        ("dta.path=a=b(1", "did you mean data.path?"),
    ],
)
def test_what_is_no_value_of_its_setting_is_refused_as_typed(typed, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose([typed])


def test_two_run_names_of_one_number_are_two_runs():
    assert [compose([f"run.name={name}"]).run.dir for name in ("1.1", "1.10")] == ["runs/1.1", "runs/1.10"]


def test_folders_with_names_like_numbers_and_signs_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / "2024_06" / "ü, (1)=#;'"
    for name in ("1_1", "true", "1e3", "0"):
        for number in range(4):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(root / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    for path in ("2024_06/ü, (1)=#;'", "~/2024_06/ü, (1)=#;'"):
        typed = [f"data.path={path}", "data=folder", "data.val_fraction=0.25", "data.classes=[1_1,true,1e3]"]
        assert open_source(compose(typed).data, "train").classes == ("1_1", "true", "1e3")


def test_a_sweep_divides_text_at_commas_and_keeps_each_value_as_typed():
    runs = split_sweep(["run.name=1.10,1.20,'a,b'", "optim.lr=1e-3"])
    assert [compose(run).run.name for run in runs] == ["1.10", "1.20", "a,b"]
    runs = split_sweep(['data.classes=[1_0,b],["c,d"]', "data.path=/x=y", "recipe=null"])
    assert [compose(run).data.classes for run in runs] == [["1_0", "b"], ["c,d"]]
    assert all(compose(run).data.path == "/x=y" for run in runs)
    assert [run[0] for run in split_sweep(["metrics.wandb=choice(1e3,null)"])] == [
        "metrics.wandb=1e3",
        "metrics.wandb=null",
    ]
    assert compose(split_sweep(["run.name=1e3", "optim.lr=1e-3,2e-3"])[0]).run.name == "1e3-lr_0.001"


@pytest.mark.parametrize("config", [LocalConfig, SlurmConfig, AzureMLConfig, KubernetesConfig])
def test_every_text_of_a_cluster_is_the_text_as_typed(config):
    types = types_of(config, "cluster.")
    found = 0
    for key, kind in types.items():
        for text in ("0123", "1e3", "true", "1_1"):
            bare = str if kind == str | None else dict[str, str] if kind == dict[str, str | None] else kind
            typed = {
                str: (f"{key}={text}", text),
                list[str]: (f"{key}=[{text}]", [text]),
                dict[str, str]: (f"{key}={{a/b-c.d: {text}}}", {"a/b-c.d": text}),
            }.get(bare)
            if typed is not None:
                assert read_setting(typed[0], types).value == typed[1]
                found += 1
    assert found >= 8


def test_a_clusters_file_and_command_line_keep_text_as_written(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "kind: slurm\nnodes: 2\ngpus_per_node: 0\nexclusive: yes\naccount: 0123\npartition: 1e3\nqos: null\n"
        "reservation: 2024-06-01\ntime: 1:30:00\nenv: {A: 01, B: on, C: '2'}\noptions: {mail-type: END, wait: }\n"
        "modules: [1.10, 'x']\n"
    )
    config = get_backend([f"cluster={file}", "cluster.constraint=1_1", "cluster.env.D=1.0", "cluster.mem=0"]).config
    assert isinstance(config, SlurmConfig)
    assert (config.nodes, config.gpus_per_node, config.exclusive) == (2, 0, True)
    assert (config.account, config.partition, config.qos, config.reservation) == ("0123", "1e3", None, "2024-06-01")
    assert (config.time, config.constraint, config.mem) == ("1:30:00", "1_1", "0")
    assert config.env == {"A": "01", "B": "on", "C": "2", "D": "1.0"}
    assert config.options == {"mail-type": "END", "wait": None}
    assert config.modules == ["1.10", "x"]
    file.write_text("kind: slurm\nnodes: two\n")
    with pytest.raises(ConfigError, match=r"cluster\.nodes: Value 'two'"):
        get_backend([f"cluster={file}"])


def test_a_job_gets_the_home_directory_of_the_desk(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    typed = ["data=folder", "data.path=~/imgs", "run.name=1e3", "train.steps=1"]
    job = plan_job(typed, LocalConfig(gpus_per_node=0))
    assert job.overrides == ["data=folder", "data.path=/home/me/imgs", "run.name=1e3", "train.steps=1"]


def test_a_commands_own_arguments_are_text_with_the_home_directory(monkeypatch):
    home = "/home/me"
    monkeypatch.setenv("HOME", home)
    args, settings = parse("megavit predict", PredictArgs, ["from=ema:~/r", "out=1e3", "images=a=b", "top=3"])
    assert (args, settings) == (PredictArgs(f"ema:{home}/r", Path("a=b"), Path("1e3"), 3), [])
    typed = ["from=~/r", "out=~/o", "optim.lr=1", "data.path=~/d"]
    args, settings = parse("megavit features", FeaturesArgs, typed, settings=True)
    assert (args, settings) == (FeaturesArgs(f"{home}/r", Path(f"{home}/o")), typed[2:])
