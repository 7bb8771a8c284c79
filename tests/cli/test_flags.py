"""Flags of the command line: values, short forms, and what they print."""

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from megavit.cli.argument_words import read_words
from megavit.cli.arguments import NoArguments, argument, describe, parse
from megavit.cli.config_flags import ConfigFlags
from megavit.cli.main import COMMANDS, full_name, main
from megavit.config.compose import compose, compose_with_sources, hydra_initialized
from megavit.config.saved import to_yaml
from megavit.config.show import config_text
from megavit.config.show_flags import Part
from megavit.errors import ConfigError


class What(Enum):
    job = "job"
    tree = "defaults-tree"


@dataclass(frozen=True)
class Flags(ConfigFlags):
    """Flags of a command.

    Attributes:
        what: which part.
        folder: where.
        dry: do nothing.
    """

    what: What | None = argument(None, key="--what", short="-w", bare=What.job)
    folder: Path | None = argument(None, key="--folder", form="DIR")
    dry: bool = argument(False, key="--dry")


@pytest.mark.parametrize(
    ("typed", "expected", "settings"),
    [
        ("--what", Flags(what=What.job), []),
        ("--what defaults-tree", Flags(what=What.tree), []),
        ("--what=defaults-tree", Flags(what=What.tree), []),
        ("-w job a.b=1", Flags(what=What.job), ["a.b=1"]),
        ("--what a.b=1", Flags(what=What.job), ["a.b=1"]),
        ("--what --dry", Flags(what=What.job, dry=True), []),
        ("--what ~optim", Flags(what=What.job), ["~optim"]),
        ("--folder a=b", Flags(folder=Path("a=b")), []),
        ("-cd one a.b=1 --config-dir=two", Flags(), ["--config-dir=one", "a.b=1", "--config-dir=two"]),
        ("-cn mine", Flags(), ["--config-name=mine"]),
    ],
)
def test_a_flag_takes_its_value_from_the_next_word_or_after_the_sign(typed, expected, settings):
    assert parse("megavit x", Flags, typed.split(), settings=True) == (expected, settings)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--folder", "--folder needs a value: --folder DIR"),
        ("--folder --dry", "--folder needs a value: --folder DIR"),
        ("--folder a --folder b", "--folder: megavit x takes --folder once, with a value"),
        ("--folder=", "--folder=: megavit x takes --folder once, with a value"),
        ("--what jbo", "--what=jbo must be one of job, defaults-tree"),
        ("--dry=1", "--dry=1: megavit x takes --dry once, without a value"),
        ("--fodler a", "megavit x knows no flag --fodler; did you mean --folder?"),
        ("-zzz", "megavit x knows no flag -zzz; its flags: --config-dir, -cd,"),
        ("-cp a", "megavit x knows no flag -cp: --config-dir DIR adds a folder of configurations"),
        ("--config-path=a", "megavit x knows no flag --config-path: --config-dir DIR adds"),
    ],
)
def test_a_wrong_flag_is_refused_with_the_way_out(typed, message):
    with pytest.raises(ConfigError) as error:
        parse("megavit x", Flags, typed.split(), settings=True)
    assert str(error.value).startswith(message)


def test_help_shows_a_flags_value_and_its_short_form():
    text = describe("megavit x", Flags, about="Do something.", settings=True)
    assert text.startswith("megavit x [--config-dir DIR] [--config-name NAME] ")
    assert " [--what [job|defaults-tree]] [--folder DIR] [--dry] [key=value …]\n" in text
    assert "  --what [job|defaults-tree], -w  which part.\n" in text
    assert "  --dry                     do nothing." in text


def test_the_commands_that_read_config_dir_are_those_that_the_others_name():
    readers = [name for name, row in COMMANDS.items() if read_words(full_name(row.module), row.function).composes]
    with pytest.raises(ConfigError) as error:
        parse("megavit x", NoArguments, ["--config-dir=a"])
    assert sorted(str(error.value).rpartition(": ")[2].split(", ")) == sorted(readers)


def test_a_folder_of_choices_is_read_in_two_words(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [vit_digits]\nnum_layers: 3\n")
    assert main(["train", "--cfg", "--config-dir", str(tmp_path), "model=mine"]) == 0
    assert "  num_layers: 3\n" in capsys.readouterr().out
    assert main(["evaluate", "from=x", "-cd", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("megavit: -cd: only commands that compose a run read it")


def printed(capsys, typed: str) -> str:
    assert main(typed.split()) == 0
    return capsys.readouterr().out


def test_cfg_shows_interpolations_as_written_and_resolve_the_runs_own_yaml(capsys):
    written = printed(capsys, "train --cfg recipe=digits_mae run.name=a")
    assert "  dir: runs/${run.name}\n" in written
    assert printed(capsys, "train recipe=digits_mae run.name=a -c job") == written
    assert printed(capsys, "submit recipe=digits_mae run.name=a --cfg=job") == written
    resolved = printed(capsys, "train --cfg job --resolve recipe=digits_mae run.name=a")
    assert resolved == to_yaml(compose(["recipe=digits_mae", "run.name=a"]))


def test_package_shows_one_node_and_hydras_settings_are_shown_apart(capsys):
    assert printed(capsys, "train --cfg job -p optim.betas") == "# @package optim.betas\n- 0.9\n- 0.999\n"
    assert printed(capsys, "train --cfg --package run.dir run.name=a") == "runs/a\n"
    assert set(yaml.safe_load(printed(capsys, "train --cfg hydra"))) == {"hydra"}
    both = yaml.safe_load(printed(capsys, "train --cfg all optim.lr=1"))
    assert both["hydra"]["overrides"]["task"][0] == "optim.lr=1"
    assert both["optim"]["lr"] == 1


@pytest.mark.parametrize(
    ("topic", "lines"),
    [
        ("defaults", ["| Config path  ", "| model/vit_digits            | model  "]),
        ("defaults-tree", ["    model: vit_digits", "    recipe: digits"]),
        ("searchpath", ["| Provider     | Search path "]),
        ("config", ["  num_layers: 4", "    model: vit_digits", "| hydra        | pkg://hydra.conf"]),
        ("plugins", ["\t\tBasicSweeper"]),
        ("all", ["\t\tBasicSweeper", "Installed Hydra Plugins", "  num_layers: 4"]),
    ],
)
def test_info_is_hydras_own(topic, lines, capsys, tmp_path):
    out = printed(capsys, f"train --info {topic} --config-dir {tmp_path}")
    for line in lines:
        assert f"\n{line}" in out
    if topic in ("searchpath", "config", "all"):
        assert re.search(rf"^\| --config-dir +\| \S+{tmp_path} +\|$", out, re.M)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("train --resolve", "--resolve says how --cfg prints the configuration: add --cfg"),
        ("train -p model", "--package says how --cfg prints the configuration: add --cfg"),
        ("train --cfg --info", "--cfg and --info print different things: type one of them"),
        ("train --cfg jobs", "--cfg=jobs must be one of job, hydra, all"),
        ("train --cfg -p model.patch", "--package model.patch: the configuration has no model.patch; did you mean"),
        ("train --cfg -p zzzzz", "--package zzzzz: the configuration has no zzzzz; it has run, train, parallel"),
        ("show-data --info tree", "--info=tree must be one of all, config, defaults, defaults-tree, searchpath,"),
    ],
)
def test_a_wrong_use_of_cfg_and_info_is_one_line_and_code_2(typed, message, capsys):
    assert main(typed.split()) == 2
    assert capsys.readouterr().err.startswith(f"megavit: {message}")


def test_every_command_of_the_page_runs_and_starts_nothing(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
    typed = [line for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "my_vit.yaml").write_text("defaults: [vit_digits]\n")
    assert len(typed) > 10
    for line in typed:
        assert main(line.split()[1:]) == 0, line
        assert capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("part", "resolve", "package"),
    [
        ("job", False, None),
        ("job", True, "_global_"),
        ("job", False, "optim"),
        ("job", False, "hydra.runtime"),
        ("hydra", True, None),
        ("hydra", False, "run.dir"),
        ("all", False, None),
        ("all", True, "run.dir"),
    ],
)
def test_cfg_prints_what_hydra_prints(part, resolve, package, capsys):
    composition = compose_with_sources(["recipe=digits", "optim.lr=1e-3"])
    overrides = list(composition.node.hydra.overrides.task)
    with hydra_initialized(composition.search):
        try:
            GlobalHydra.instance().hydra.show_cfg("train", overrides, part, package, resolve=resolve)
        except SystemExit:
            with pytest.raises(ConfigError, match="the configuration has no"):
                config_text(composition, part=Part(part), resolve=resolve, package=package)
            return
    texts = (config_text(composition, part=Part(part), resolve=resolve, package=package), capsys.readouterr().out)
    # Hydra's own folder is named by the time.
    ours, theirs = (re.sub(r"\d\d-\d\d-\d\d", "TIME", text) for text in texts)
    assert ours == theirs
