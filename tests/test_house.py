"""The counts of `python -m benchmarks.house`: true of this repository, and each found where it is broken."""

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from benchmarks.house import measure

ROOT = Path(__file__).parents[1]
CONTRACT = """
[[tool.importlinter.contracts]]
type = "layers"
layers = ["megavit.cli", "megavit.train | megavit.cluster", "megavit.data", "megavit.errors"]
"""


def build(root: Path, files: dict[str, str]) -> dict[str, tuple[int, bool]]:
    for path, text in {"pyproject.toml": CONTRACT, "megavit/__init__.py": "", **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return {count.name: (count.found, count.holds) for count in measure(root)}


def test_every_aim_holds_in_this_repository():
    assert {count.name: count.places for count in measure(ROOT) if not count.holds} == {}


def test_the_contract_has_at_most_twelve_rows():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert sum(len(contract["layers"]) for contract in contracts if contract["type"] == "layers") <= 12


def test_folders_and_modules_of_the_root_are_counted(tmp_path):
    folders = {f"megavit/f{number}/a.py": "" for number in range(15)}
    found = build(tmp_path, {**folders, **{f"megavit/m{number}.py": "" for number in range(5)}})
    assert found["root folders"] == (15, False)
    assert found["root modules"] == (6, False)


def test_a_cycle_is_found_within_functions_and_not_where_the_type_checker_alone_imports(tmp_path):
    late = "def f():\n    from megavit.data import a\n"
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megavit.data import c\n"
    files = {
        "megavit/data/a.py": "import megavit.data.b",
        "megavit/data/b.py": late,
        "megavit/data/c.py": "from megavit.data import d",
        "megavit/data/d.py": typing,
    }
    assert build(tmp_path, files)["import cycles"] == (1, False)


def test_arrows_up_between_siblings_and_from_a_folder_without_a_layer_are_found(tmp_path):
    files = {
        "megavit/errors.py": "",
        "megavit/cli/a.py": "import megavit.data.a\nimport megavit.errors",
        "megavit/data/a.py": "def f():\n    import megavit.train.a",
        "megavit/train/a.py": "import megavit.cluster.a",
        "megavit/cluster/a.py": "",
    }
    assert build(tmp_path, files)["arrows up in the contract"] == (2, False)
    files["megavit/other/a.py"] = "import megavit.data.a"
    assert build(tmp_path, files)["arrows up in the contract"] == (3, False)


def test_a_file_of_one_importer_counts_outside_cli_alone(tmp_path):
    modules = {f"megavit/data/m{number}.py": "" for number in range(50)}
    imports = "\n".join(f"import megavit.data.m{number}" for number in range(50))
    files = {**modules, "megavit/data/a.py": imports + "\nimport megavit.cli.b", "megavit/cli/b.py": ""}
    assert build(tmp_path, files)["files with one importer"] == (50, False)
    assert build(tmp_path, {"benchmarks/a.py": "import megavit.data.m0"})["files with one importer"] == (49, True)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("class Keeper: pass", 1),
        ("from x import donor", 1),
        ("def f(x):\n    return x.newest_whole", 1),
        ("f(pedigree=1)", 1),
        ("class Row: pass", 1),
        ("from rich.table import Row\nRow()", 0),
        ("def f(block: TransformerConfig): pass", 1),
        ("def f(block: int): pass", 0),
        ("class A:\n    def f(self): return self.see", 1),
        ("see = 1", 0),
        ("text = 'Keeper'  # donor", 0),
    ],
)
def test_a_retired_identifier_is_found_in_the_form_that_was_ours(tmp_path, code, found):
    assert build(tmp_path, {"megavit/data/a.py": code})["retired identifiers"] == (found, found == 0)


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("megavit/optim/config.py", "class C:\n    decay: str = 'cosine'\n", 1),
        ("conf/optim/adamw.yaml", "decay: cosine\n", 1),
        ("conf/recipe/a.yaml", "data:\n  erase: 0.25\n", 1),
        ("conf/recipe/a.yaml", "data:\n  random_erasing: 0.25\n", 0),
        ("README.md", "`metrics.every=5`\n", 1),
        ("CHANGELOG.md", "`metrics.every` is `metrics.log_every`\n", 0),
        ("docs/a.md", "`optim.decay_power`\n", 0),
    ],
)
def test_a_retired_setting_is_found_in_configurations_yaml_and_text(tmp_path, path, text, found):
    assert build(tmp_path, {path: text})["retired settings"] == (found, found == 0)


def test_a_retired_file_name_is_found(tmp_path):
    files = {"megavit/train/keeping.py": "", "megavit/planner/search.py": "", "tests/test_rows.py": ""}
    assert build(tmp_path, files)["retired file names"] == (1, False)


def test_the_command_leaves_code_3_and_names_what_is_wrong(tmp_path):
    build(tmp_path, {"megavit/data/a.py": "class Keeper: pass"})
    command = [sys.executable, "-m", "benchmarks.house", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 3
    assert "megavit/data/a.py:1: Keeper; now Checkpointer" in done.stdout
    (tmp_path / "megavit/data/a.py").write_text("")
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
