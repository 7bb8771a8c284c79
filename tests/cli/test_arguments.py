"""One parser for the arguments of all commands, and one table of commands."""

import importlib
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from megavit.cli import main as command_line
from megavit.cli.arguments import argument, describe, parse, usage
from megavit.cli.main import COMMANDS, Command, main
from megavit.errors import ConfigError


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass(frozen=True)
class Args:
    """A command's arguments.

    Attributes:
        from_: where it
            comes from.
        k: some numbers.
        share: how much.
        colour: of it.
        names: several words.
        count: how many.
        dry: do nothing.
    """

    from_: str = argument(form="RUN")
    k: tuple[int, ...] = (1, 5)
    share: float = argument(0.5, above=0)
    colour: Colour | None = None
    names: tuple[str, ...] = ()
    count: int | None = argument(None, form="N")
    dry: bool = argument(False, key="--dry", short="-d")


def test_values_get_the_types_of_the_dataclass_and_settings_stay_as_typed():
    typed = ["k=5,5,2", "from='a b'", "share=2", "colour=blue", "names=[x, y]", "count=null", "-d", "optim.lr=1"]
    args, settings = parse("megavit x", Args, typed, settings=True)
    assert args == Args("a b", (5, 2), 2.0, Colour.blue, ("x", "y"), None, True)
    assert settings == ["optim.lr=1"]
    assert parse("megavit x", Args, ["from=r"]) == (Args("r"), [])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "megavit x needs from=RUN: megavit x from=RUN [k=1,5]"),
        (["from="], "from=: megavit x takes from= once, with a value"),
        (["from=a", "from=b"], "from=b: megavit x takes from= once, with a value"),
        (["from=a", "--dry=1"], "--dry=1: megavit x takes --dry once"),
        (["from=a", "k=0"], "k=0 must be a whole number of at least 1"),
        (["from=a", "k=1,b"], "k=b must be a whole number of at least 1"),
        (["from=a", "share=0"], "share=0 must be a finite number above 0"),
        (["from=a", "share=nan"], "share=nan must be a finite number above 0"),
        (["from=a", "colour=green"], "colour=green must be one of red, blue"),
        (["from=a", "form=b"], "megavit x knows no form=; did you mean from=?"),
        (["from=a", "zzz=b"], "megavit x knows no zzz=; megavit x from=RUN"),
        (["from=a", "word"], "'word' is no setting: megavit x from=RUN"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_way_out(typed, message):
    with pytest.raises(ConfigError) as error:
        parse("megavit x", Args, typed)
    assert str(error.value).startswith(message)


def test_only_the_settings_that_a_command_names_pass():
    assert parse("x", Args, ["from=a", "data.mean=[0]"], settings=("data.mean",))[1] == ["data.mean=[0]"]
    with pytest.raises(ConfigError, match=r"x knows no data\.man=; did you mean data\.mean=\?"):
        parse("x", Args, ["from=a", "data.man=[0]"], settings=("data.mean",))


def test_a_mistyped_argument_is_no_setting_and_init_from_is_one():
    with pytest.raises(ConfigError, match="did you mean share="):
        parse("x", Args, ["from=a", "shar=1"], settings=True)
    assert parse("x", Args, ["from=a", "init_from=b"], settings=True)[1] == ["init_from=b"]


def test_help_is_made_of_the_dataclass():
    text = describe("megavit x", Args, about="Do something.", settings=True)
    assert text.splitlines()[0] == usage("megavit x", Args, settings=True)
    assert usage("megavit x", Args) == (
        "megavit x from=RUN [k=1,5] [share=0.5] [colour=red|blue] [names=…] [count=N] [--dry]"
    )
    assert "  from=RUN         where it comes from.\n" in text
    assert "  k=1,5            some numbers. (default 1,5)\n" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_line_in_the_usage_and_explains_each_of_its_arguments(name, capsys):
    assert main(["--help"]) == 0
    assert f"  {name} " in capsys.readouterr().out
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"megavit {name}")
    _, _, arguments = out.partition("arguments\n")
    for line in arguments.partition("\n\n")[0].splitlines():
        # A key, at least two blanks, an explanation; or the explanation's next line.
        assert len(line.split("  ", 2)[-1].strip()) > 3, line


TOY = '''
"""`megavit toy size=N`: print numbers."""

from dataclasses import dataclass

from megavit.cli.arguments import argument


@dataclass(frozen=True)
class ToyArgs:
    """The command's own arguments.

    Attributes:
        size: how many numbers.
    """

    size: int = argument(form="N")


def toy(args: ToyArgs, settings: list[str]) -> int:
    """Print numbers, then the settings."""
    print(*range(args.size), *settings)
    return 0
'''


def test_a_new_command_is_a_file_and_a_row(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(importlib.import_module("megavit.cli"), "__path__", [str(tmp_path)])
    monkeypatch.setitem(command_line.COMMANDS, "toy", Command("toy", "toy", "print numbers"))
    assert main(["toy", "size=3", "optim.lr=1"]) == 0
    assert capsys.readouterr().out == "0 1 2 optim.lr=1\n"
    assert main(["toy", "--help"]) == 0
    assert "size=N  how many numbers." in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "  toy          print numbers\n" in capsys.readouterr().out
    assert main(["toi"]) == 2
    assert capsys.readouterr().err == "megavit: the command toi does not exist; did you mean toy?\n"
    assert main(["toy", "siz=3"]) == 2
    assert "did you mean size=?" in capsys.readouterr().err


def test_a_command_without_settings_refuses_them(capsys):
    assert main(["recipes", "optim.lr=1"]) == 2
    assert capsys.readouterr().err == "megavit: megavit recipes knows no optim.lr=; megavit recipes\n"


def test_the_documented_command_explains_itself(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
    program, row = re.findall(r"```python\n# megavit/cli/(?:count|main)\.py.*?\n(.*?)```", text, re.DOTALL)
    (tmp_path / "count.py").write_text(program)
    monkeypatch.setattr(importlib.import_module("megavit.cli"), "__path__", [str(tmp_path)])
    monkeypatch.setitem(command_line.COMMANDS, "count", eval(f"{{{row}}}", {"Command": Command})["count"])
    assert main(["count", "--help"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "megavit count from=RUN [digits=3]", "", "count a run's weights",
    ]  # fmt: skip
    assert main(["count"]) == 2
    assert "megavit count needs from=RUN" in capsys.readouterr().err
