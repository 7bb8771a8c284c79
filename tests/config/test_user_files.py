"""Files of the user's: recipes by path, folders of choices, errors with file and line, and no code from YAML."""

import random
import string
from pathlib import Path

import pytest

from megavit.cli.main import run
from megavit.cluster.registry import get_backend
from megavit.config.compose import compose, compose_with_sources, fix_start_time
from megavit.config.portable import make_portable
from megavit.config.saved import merge, to_yaml
from megavit.config.search_path import split_search_path
from megavit.errors import ConfigError

MY_RECIPE = """\
# @package _global_
defaults:
  - override /model: my_vit
  - override /data: digits
run:
  name: 1.10
train:
  steps: 20
  global_batch: 16
optim:
  lr: 1e-3
  warmup_steps: 2
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with conf/recipe/mine.yaml, conf/model/my_vit.yaml and conf/cluster/mine.yaml."""
    _write(tmp_path / "conf/recipe/mine.yaml", MY_RECIPE)
    _write(tmp_path / "conf/model/my_vit.yaml", "defaults: [vit_digits, _self_]\nnum_layers: 2\n")
    _write(tmp_path / "conf/cluster/mine.yaml", "kind: slurm\nnodes: 2\ngpus_per_node: 0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_conf_in_the_working_directory_is_found_and_named(here):
    found = compose_with_sources(["recipe=mine"])
    assert (found.config.run.name, found.config.train.steps, found.config.model.num_layers) == ("1.10", 20, 2)
    assert found.config.model.hidden_size == compose(["model=vit_digits"]).model.hidden_size
    assert found.notes == (f"choices found in {here}/conf: model=my_vit, recipe=mine",)
    assert set(found.files) == {here / "conf/recipe/mine.yaml", here / "conf/model/my_vit.yaml"}
    assert compose(["recipe=mine", "train.steps=5"]).train.steps == 5


def test_a_copy_of_megavits_own_conf_is_not_the_users(here):
    for name in ("train.yaml", "own_images.yaml"):
        _write(here / "conf" / name, "{}")
    assert compose_with_sources([]).notes == ()


def test_a_recipe_is_a_file_anywhere_and_later_ones_win(here, tmp_path):
    base = _write(tmp_path / "a folder/base.yaml", "train: {steps: 7, global_batch: 8}\noptim: {warmup_steps: 1}\n")
    over = _write(tmp_path / "over.yaml", "train: {steps: 9}\n")
    assert compose([f"recipe={base}"]).train.steps == 7
    several = compose([f"recipe=[digits,{base},over.yaml]"])
    assert (several.train.steps, several.train.global_batch, several.run.name) == (9, 8, "digits")
    assert compose([f"recipe=[{over},{base}]"]).train.steps == 7
    assert compose([f"recipe=[mine,{over}]"]).model.num_layers == 2


def test_a_file_includes_its_neighbours_and_groups(here):
    _write(
        here / "more/mine2.yaml", "defaults:\n  - neighbour\n  - override /optim: sgd\n  - _self_\noptim: {lr: 0.5}\n"
    )
    _write(here / "more/neighbour.yaml", "train: {steps: 3}\noptim: {warmup_steps: 1}\n")
    config = compose(["recipe=more/mine2.yaml"])
    assert (config.train.steps, config.optim.name, config.optim.lr) == (3, "sgd", 0.5)


@pytest.mark.parametrize("recipe", ["digits", "digits_mae", "nemo_vit_b16"])
def test_a_runs_own_config_is_a_recipe(here, recipe):
    config = compose([f"recipe={recipe}", *(["data.path=/x"] if recipe.startswith("nemo") else [])])
    _write(here / "config.yaml", to_yaml(config))
    assert compose(["recipe=config.yaml"]) == config
    other = compose(["recipe=config.yaml", "run.seed=7", "run.name=other"])
    assert (other.run.seed, other.run.dir) == (7, "runs/other")


def test_text_settings_of_a_file_are_taken_as_written(here):
    _write(here / "t.yaml", "run: {name: 2024_06_01}\ndata:\n  path: 1e3\n  classes: [1_1, on, 007]\n")
    config = compose(["recipe=t.yaml"])
    assert (config.run.name, config.data.path, config.data.classes) == ("2024_06_01", "1e3", ["1_1", "on", "007"])


def test_config_dir_comes_before_megavits_own_and_says_so(here, tmp_path):
    folder = _write(tmp_path / "other/model/vit_digits.yaml", "num_layers: 3\nhidden_size: 32\nnum_heads: 2\n").parents[
        1
    ]
    first = compose_with_sources([f"--config-dir={folder}"])
    assert first.config.model.num_layers == 3
    assert any(f"model=vit_digits is {folder}/model/vit_digits.yaml" in note for note in first.notes)
    last = compose_with_sources([f"hydra.searchpath=[{folder}]"])
    assert last.config.model.num_layers == compose([]).model.num_layers == 4
    assert any(f"{folder}/model/vit_digits.yaml is not used" in note for note in last.notes)


def test_a_primary_configuration_of_ones_own(here):
    _write(here / "conf/mine.yaml", "defaults: [train, _self_]\nrun: {name: own}\n")
    assert compose(["--config-name=mine"]).run.name == "own"
    _write(here / "conf/bare.yaml", "run: {name: own}\n")
    with pytest.raises(ConfigError, match="its defaults list must begin with train"):
        compose(["--config-name=bare"])


def test_a_cluster_of_the_users_is_a_choice(here):
    search, _ = split_search_path([])
    assert get_backend(["cluster=mine"], search=search).config.nodes == 2


def test_a_job_carries_the_settings_of_the_users_files(here, monkeypatch):
    typed = ["recipe=mine", "run.name=${now:%Y}", 'data.classes=[a b,"c,d"]']
    config, portable = compose(typed), make_portable(typed)
    assert make_portable(["recipe=digits"]) == ["recipe=digits"]
    monkeypatch.chdir("/")
    assert compose(portable) == config


def test_now_is_the_same_in_every_process_of_a_run(here, monkeypatch):
    typed = fix_start_time(["run.name=${now:%H%M%S%f}"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compose(typed).run.name == compose(typed).run.name
    with pytest.raises(ConfigError, match="differs between ranks"):
        compose(["run.name=${now:%Y}"])
    assert fix_start_time(["run.name=a"]) == ["run.name=a"] or (here / "conf").exists()


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("train:\n\tsteps: 1\n", 2, "a tab indents this line"),
        ("train:\n  steps: 1\n  steps: 2\n", 3, "steps was set in line 2 already"),
        ("train: &a\n  steps: 1\n", 1, "anchors are not read"),
        ("train: {steps: *a}\n", 1, "anchors are not read"),
        ("run:\n  name: !!python/object/apply:os.system [touch pwned]\n", 2, "a configuration runs no code"),
        ("run: {name: !env HOME}\n", 1, "tags are not read"),
        ("trian:\n  steps: 1\n", 1, "the setting trian does not exist"),
        ("train:\n  stepz: 1\n", 2, "train.stepz does not exist; did you mean train.steps"),
        ("optim:\n  decay: cosine\n", 2, "optim.decay is renamed to optim.schedule"),
        ("train: 5\n", 1, "train is a group of settings"),
        ("train:\n  steps: many\n", 2, "train.steps: Value 'many'"),
        ("run:\n  name: ${oc.env:NOT_SET}\n", 2, "Environment variable 'NOT_SET' not found"),
        ("run:\n  name: ${run.nothing}\n", 2, "run.nothing"),
        ("defaults:\n  - override /model: vit_b61\n", 2, "model/vit_b61 does not exist; did you mean vit_b16"),
        ("defaults:\n  - override /modl: vit_b16\n", 2, "Could not override 'modl'"),
        ("defaults:\n  - nothing\n", 2, "recipe/nothing does not exist"),
        ("defaults:\n  - r\n", 1, "the defaults lists include each other: r → r"),
        ("defaults: digits\n", 1, "defaults is a list"),
        ("defaults:\n  - model: 5\n", 2, "an entry of defaults is"),
        ("defaults:\n  - {a: b, c: d}\n", 2, "an entry of defaults is"),
        ("# @packag e: _global_\n", 1, "a header is a comment such as"),
        ("- 1\n", 1, "a configuration has keys and values"),
        ("a: [1\n", 2, "expected"),
        ("task:\n  mask_ratio: 0.5\n", 2, "would be ignored by task.name=classify"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(here, text, line, message):
    file = _write(here / "r.yaml", text)
    with pytest.raises(ConfigError) as refused:
        compose([f"recipe={file}"])
    assert str(refused.value).startswith(f"{file}:{line}: "), refused.value
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (here / "pwned").exists()


def test_a_wrong_key_in_a_choice_of_a_group_is_refused_with_its_line(here):
    file = _write(here / "conf/model/my_vit.yaml", "defaults: [vit_digits, _self_]\n\nnum_layer: 2\n")
    with pytest.raises(
        ConfigError, match=f"{file}:3: the setting model.num_layer does not exist; did you mean model.num_l"
    ):
        compose(["recipe=mine"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe=none.yaml"], r"the file .*none\.yaml does not exist"),
        (["recipe=mine.yaml"], r"did you mean recipe=mine\?"),
        (["recipe=conf/recipe"], "does not exist"),
        (["recipe=[1,2]"], r"recipe=\[1,2\] does not exist; known: "),
        (["model=[1,[2]]"], r"model=\[1,\[2\]\] does not exist"),
        (["model=[vit_b16,vit_b61]"], "did you mean model=vit_b16"),
        (["--config-dir=none"], "the folder .*none does not exist"),
        (["--config-name=none"], "no none.yaml in"),
        (["hydra.searchpath=[none]"], "the folder .*none does not exist"),
        (["hydra.searchpath=[s3://x]"], "must be a folder"),
        (["hydra.run.dir=x"], "run.dir is the run's folder"),
        (["hydra.verbose=true"], "a setting of Hydra's own application"),
    ],
)
def test_a_missing_file_or_folder_is_one_line(here, overrides, message):
    with pytest.raises(ConfigError, match=message) as refused:
        compose(overrides)
    assert "\n" not in str(refused.value)


def test_a_saved_run_takes_no_folders(here):
    with pytest.raises(ConfigError, match="needs no other files"):
        merge(compose([]), ["--config-dir=conf"])


def _refusal(overrides: list[str]) -> str:
    try:
        compose(overrides)
    except ConfigError as error:
        return str(error)
    return ""


def _fuzzed(draw: random.Random) -> str:
    """A YAML file that is broken at a few places."""
    text = draw.choice([MY_RECIPE, to_yaml(compose([])), "defaults: [digits, _self_]\ntrain: {steps: 3}\n"])
    words = [
        "!!python/name:os.system",
        "&a",
        "*a",
        "\t",
        "<<: {",
        "}",
        "[",
        "${",
        "${now:%Y}",
        "- ",
        ": ",
        "\x00",
        "ä",
        "'",
        '"',
        "|",
        ">",
    ]
    for _ in range(draw.randint(1, 4)):
        at, what = draw.randrange(len(text) + 1), draw.random()
        if what < 0.5:
            text = text[:at] + draw.choice([*words, draw.choice(string.printable)]) + text[at:]
        elif what < 0.8:
            text = text[:at] + text[at + draw.randint(1, 9) :]
        else:
            text = text[:at] + text[draw.randrange(len(text) + 1) :]
    return text


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_fuzzed_files_compose_or_are_refused_in_one_line(here, monkeypatch, count):
    draw = random.Random(count)
    monkeypatch.setattr("os.system", lambda command: pytest.fail(f"ran {command}"))
    refused = 0
    for _ in range(count):
        text = _fuzzed(draw)
        (here / "fuzzed.yaml").write_bytes(text.encode())
        message = _refusal(["recipe=fuzzed.yaml"])
        assert "\n" not in message, text
        refused += bool(message)
    assert 0 < refused < count


@pytest.mark.parametrize("source", [["recipe=digits_mae"], ["recipe=digits_probe"], ["optim=lars", "optim.lr=0.1"]])
def test_a_new_recipe_file_composes_to_what_it_was_written_from(here, capsys, source):
    assert run(["config", "new", "new/mine.yaml", *source]) == 0
    assert "megavit train recipe=new/mine.yaml" in capsys.readouterr().out
    assert compose(["recipe=new/mine.yaml"]) == compose(source)
    with pytest.raises(ConfigError, match="exists; choose another name"):
        run(["config", "new", "new/mine.yaml"])


@pytest.mark.parametrize("words", [[], ["new"], ["new", "recipe=digits"], ["old", "a.yaml"]])
def test_config_says_how_it_is_typed(here, words):
    with pytest.raises(ConfigError, match=r"write megavit config new FILE\.yaml"):
        run(["config", *words])
