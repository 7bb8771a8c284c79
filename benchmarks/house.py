"""Count folders, import cycles, upward imports and retired names of the package, and compare each count with its limit.

python -m benchmarks.house [ROOT]

The exit code is 0 if every count is within its limit, else 3. The source is read, never imported.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import tomllib
import yaml

from megavit.config.settings import RENAMED

# Retired names, each with its replacement. A word with an ordinary meaning too is listed only in the retired form:
# `class X`, `def X`, `self.X` (an attribute of a class of megavit) or `X: T` (an argument of that type).
NAMES = {
    "Keeper": "Checkpointer",
    "introduction": "describe_run",
    "Donor": "WeightSource",
    "ForeignDonor": "ExternalWeights",
    "def give": "load_into",
    "Pedigree": "WeightsInfo",
    "pedigree": "info",
    "donor": "source",
    "rehearse": "run_preflight",
    "Rehearsal": "PreflightRun",
    "rehearsal": "preflight",
    "rehearsed": "preflight",
    "RunSection": "RunConfig",
    "TrainSection": "TrainConfig",
    "RunSettings": "ExperimentConfig",
    "run_as_rank": "run_rank",
    "_claim": "_report_first",
    "def heard": "_report_first",
    "run_apart": "run_in_subprocess",
    "Stand": "CaseRunner",
    "Contestant": "Candidate",
    "contestant": "candidate",
    "contestants": "candidates",
    "Peer": "Baseline",
    "practise": "warm_up",
    "judge": "outputs",
    "rehearse_evaluation": "evaluate_fewest",
    "Parking": "CpuOffload",
    "def park": "offload",
    "bring_back": "restore",
    "Judgement": "StepOutput",
    "class World": "WorkerPool",
    "Goal": "MonitoredMetric",
    "self.goal": "monitor",
    "def goal": "monitor",
    "gather_whole": "gather_full_state_dict",
    "newest_whole": "latest_valid",
    "_told": "describe_…",
    "told": "text, reason",
    "told_of_data": "data_warnings",
    "told_to_cluster": "cluster_exit_code",
    "_told_of": "describe_…",
    "foreign": "external",
    "open_foreign": "open_external",
    "read_foreign": "read_external",
    "PlainViT": "TorchViT",
    "plain_weights": "timm_weights",
    "to_plain": "to_timm",
    "class Row": "ParamMapping, BenchmarkCase",
    "class Weights": "CheckpointRef",
    "find_weights": "resolve_checkpoint",
    "class Origin": "ResumePoint",
    "find_origin": "find_resume_point",
    "def by_name": "import_plugin",
    "def is_name": "is_plugin",
    "verb": "command",
    "_LOOKING": "_COMMANDS",
    "_look": "_run_command",
    "def leaves": "flatten",
    "def shown": "format_value",
    "uncollected": "gc_paused",
    "Reporter": "MetricLogger",
    "self.reporter": "logger",
    "speaks": "is_main",
    "StepVote": "StopConsensus",
    "def cast": "start",
    "from_rank_zero": "broadcast_from_rank0",
    "agree_on_error": "raise_on_all_ranks",
    "BoundarySpec": "ActivationSpec",
    "block: TransformerConfig": "mcore_config",
    "keep_BK": "ids_keep_BK",
    "seen_patches": "visible_patches",
    "def paint": "visualize",
    "def panels": "image_grid",
    "def score": "evaluate_sums",
    "score_shapes": "metric_sums",
    "self.widen": "fc1_gelu",
    "def widen": "fc1_gelu",
    "def narrow": "fc2",
    "View": "ImageTransform",
    "def cut": "crop",
    "def change": "augment",
    "Samples": "SampleDataset",
    "class Micro": "MicroBatch",
    "class Needs": "RequiredFields",
    "read_ahead": "prefetch",
    "SampleOrder": "DeterministicSampler",
    "Bijection": "FeistelPermutation",
    "kept_or_built": "load_or_build",
    "self.see": "preprocess",
    "class Asked": "FeatureArgs",
    "share_out": "use_per_rank_shards",
    "def _take": "_load",
    "self._spread": "_rotate_writers",
    "clear_up": "remove_partial",
    "own_donor": "local_init_from",
    "Classify": "ClassificationTask",
    "open_task": "build_task",
    "whole_number": "parse_int",
}

# Retired file names, as paths from the root, each with its replacement; `*` matches any folders.
FILES = {
    "megavit/*keeping.py": "train/checkpointer.py",
    "megavit/*introduce.py": "train/summary.py",
    "megavit/*donor.py": "train/pretrained.py",
    "megavit/*sections.py": "config/train.py",
    "megavit/*outcome.py": "runtime/exit_handler.py",
    "megavit/*apart.py": "cli/doctor/isolated.py",
    "benchmarks/*stand.py": "benchmarks/step/runner.py",
    "benchmarks/*peers.py": "benchmarks/step/baselines.py",
    "benchmarks/*parking.py": "benchmarks/step/offload.py",
    "benchmarks/*gate.py": "benchmarks/step/parity_check.py",
    "benchmarks/*world.py": "benchmarks/step/processes.py",
    "megavit/*goal.py": "task/monitor.py",
    "megavit/*whole.py": "checkpoint/full_state.py",
    "megavit/*note.py": "train/optimizer_summary.py",
    "megavit/exchange/*": "checkpoint/convert/",
    "megavit/*foreign*.py": "checkpoint/convert/external_model.py",
    "megavit/*plain*.py": "model/torch_vit.py",
    "megavit/search.py": "checkpoint/find.py",
    "megavit/*restore.py": "train/resume.py",
    "megavit/*extension.py": "plugins.py",
    "megavit/*verb*.py": "cli/",
    "megavit/*agree.py": "parallel/collectives.py",
    "megavit/data/*listed.py": "data/sources/csv_file.py",
    "megavit/data/*rows.py": "data/sources/hf_dataset.py",
    "megavit/data/*walk.py": "data/sources/list_files.py",
    "megavit/data/*opening.py": "data/sources/registry.py",
    "megavit/*bijection.py": "data/permutation.py",
    "megavit/*places.py": "cluster/paths.py",
}

# Files that may name retired settings, because they report the changes.
_HISTORY = ("CHANGELOG.md", "docs/log.md")
_TEXTS = (".md", ".yaml", ".j2", ".sh", "Makefile")


@dataclass(frozen=True)
class Count:
    """One count; its limit is `most`."""

    name: str
    found: int
    most: int
    places: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Return whether the count is within its limit."""
        return self.found <= self.most


@dataclass(frozen=True)
class Import:
    """An import of one module of the package by another; `typing` is true if only the type checker runs it."""

    importer: str
    imported: str
    typing: bool


def modules(root: Path) -> dict[str, Path]:
    """Return the package's modules by dotted name; a folder's `__init__` has the folder's name."""
    found = {}
    for path in sorted((root / "megavit").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(known: dict[str, Path], users: dict[str, Path] | None = None) -> set[Import]:
    """Return the imports of known modules, at the top of a file or within a function.

    Args:
        known: the package's modules.
        users: files to read; None for the package's own.
    """
    found = set()
    for name, path in (known if users is None else users).items():
        tree = ast.parse(path.read_text())
        typing = {id(inner) for block in ast.walk(tree) if _for_typing(block) for inner in ast.walk(block)}
        for node in ast.walk(tree):
            found |= {Import(name, target, id(node) in typing) for target in _targets(node, known) if target != name}
    return found


def _for_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _targets(node: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name if name in known else node.module for name in names if {name, node.module} & known.keys())


def cycles(edges: Iterable[Import]) -> list[str]:
    """Return the import cycles; an edge that closes one cycle is removed before the next is searched."""
    graph: dict[str, set[str]] = {}
    for edge in edges:
        if not edge.typing:
            graph.setdefault(edge.importer, set()).add(edge.imported)
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]
            found.append(" -> ".join(circle))
            graph[circle[0]].discard(circle[1])
        else:
            return found


def layers(root: Path) -> dict[str, int]:
    """Return each folder's layer in the contract of pyproject.toml; 0 is the highest."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    rows = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return {name.strip(): floor for floor, row in enumerate(rows) for name in row.split("|")}


def arrows_up(edges: Iterable[Import], floors: dict[str, int]) -> list[str]:
    """Return the imports between folders that do not run downwards, and the folders without a layer."""
    found = set()
    for edge in edges:
        importer, imported = (".".join(name.split(".")[:2]) for name in (edge.importer, edge.imported))
        if importer == imported or "megavit" in (importer, imported) or importer == "megavit.__main__":
            continue
        for name in (importer, imported):
            if name not in floors:
                found.add(f"{name} is not in the contract")
        if floors.get(importer, -1) >= floors.get(imported, len(floors)):
            found.add(f"{edge.importer} -> {edge.imported}")
    return sorted(found)


def with_one_importer(known: dict[str, Path], edges: Iterable[Import]) -> list[str]:
    """Return the modules outside cli/ that only one file imports."""
    importers = Counter(imported for _, imported in {(edge.importer, edge.imported) for edge in edges})
    return [
        name
        for name, path in known.items()
        if importers[name] == 1 and path.name != "__init__.py" and not name.startswith("megavit.cli.")
    ]


def retired_names(root: Path) -> list[str]:
    """Return the places where code uses a name of `NAMES`."""
    found = []
    for path in _python(root):
        for line, form in sorted(_forms(ast.parse(path.read_text()))):
            if form in NAMES:
                found.append(f"{path.relative_to(root)}:{line}: {form}; now {NAMES[form]}")
    return found


def _forms(tree: ast.AST) -> set[tuple[int, str]]:
    found: set[tuple[int, str]] = set()
    for node in ast.walk(tree):
        names: tuple[str | None, ...] = ()
        if isinstance(node, ast.ClassDef):
            names = (node.name, f"class {node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = (node.name, f"def {node.name}")
        elif isinstance(node, ast.Name):
            names = (node.id,)
        elif isinstance(node, ast.arg):
            names = (node.arg, f"{node.arg}: {ast.unparse(node.annotation)}" if node.annotation else None)
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            names = (node.attr, f"self.{node.attr}" if own else None)
        elif isinstance(node, ast.keyword | ast.alias):
            names = (node.arg if isinstance(node, ast.keyword) else node.name, getattr(node, "asname", None))
        found |= {(getattr(node, "lineno", 0), name) for name in names if name}
    return found


def retired_settings(root: Path) -> list[str]:
    """Return the places where a configuration, a YAML file or a text names a setting of `RENAMED`."""
    found = [f"{place}: {setting}; now {RENAMED[setting]}" for setting, place in _declared(root) if setting in RENAMED]
    words = re.compile(r"(?<![\w.])(" + "|".join(map(re.escape, RENAMED)) + r")(?![\w.])")
    for path in _files(root):
        if path.name.endswith(_TEXTS) and str(path.relative_to(root)) not in _HISTORY:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                found += [f"{path.relative_to(root)}:{number}: {word}" for word in words.findall(line)]
    return found


def _declared(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((root / "megavit").glob("*/config.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield f"{path.parent.name}.{node.target.id}", f"{path.relative_to(root)}:{node.lineno}"
    for path in sorted((root / "conf").rglob("*.yaml")):
        values = yaml.safe_load(path.read_text()) or {}
        group = path.parent.name
        nested = {f"{key}.{inner}" for key, value in values.items() if isinstance(value, dict) for inner in value}
        for setting in sorted({f"{group}.{key}" for key in values} | nested):
            yield setting, str(path.relative_to(root))


def retired_files(root: Path) -> list[str]:
    """Return the files that have a name of `FILES`."""
    paths = [str(path.relative_to(root)) for path in _python(root)]
    return [f"{path}; now {new}" for path in paths for old, new in FILES.items() if fnmatch(path, old)]


def _python(root: Path) -> list[Path]:
    return [path for path in _files(root) if path.suffix == ".py"]


def _files(root: Path) -> list[Path]:
    folders = ("megavit", "benchmarks", "tests", "conf", "docs", "launch", "docker")
    inside = (path for folder in folders for path in (root / folder).rglob("*"))
    return sorted(path for path in (*root.glob("*"), *inside) if path.is_file() and "__pycache__" not in path.parts)


def measure(root: Path) -> list[Count]:
    """Return all counts of the repository at `root`."""
    known = modules(root)
    edges = sorted(imports(known), key=lambda edge: (edge.importer, edge.imported))
    package = root / "megavit"
    folders = sorted({name.split(".")[1] for name, path in known.items() if path.parent != package})
    alone = sorted(path.name for path in package.glob("*.py"))
    circles, up = cycles(edges), arrows_up(edges, layers(root))
    beside = (path for folder in ("benchmarks", "launch", "docker") for path in (root / folder).rglob("*.py"))
    single = with_one_importer(known, {*edges, *imports(known, {str(path): path for path in beside})})
    names, settings, files = retired_names(root), retired_settings(root), retired_files(root)
    return [
        Count("root folders", len(folders), 14, tuple(folders)),
        Count("root modules", len(alone), 5, tuple(alone)),
        Count("import cycles", len(circles), 0, tuple(circles)),
        Count("arrows up in the contract", len(up), 0, tuple(up)),
        Count("files with one importer", len(single), 49, tuple(single)),
        Count("retired identifiers", len(names), 0, tuple(names)),
        Count("retired settings", len(settings), 0, tuple(settings)),
        Count("retired file names", len(files), 0, tuple(files)),
    ]


def main() -> int:
    """Print the table, then the places of counts above their limit; return 3 if there are some, else 0."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    counts = measure(root)
    print(f"{'':28}{'found':>6}{'at most':>9}")
    for count in counts:
        print(f"{count.name:28}{count.found:6}{count.most:9}{'' if count.holds else '  <-'}")
    for edge in sorted(imports(modules(root)), key=str):
        if edge.typing:
            print(f"only for the type checker: {edge.importer} -> {edge.imported}")
    for count in counts:
        if not count.holds:
            print(f"\n{count.name}:", *count.places, sep="\n  ")
    return 0 if all(count.holds for count in counts) else 3


if __name__ == "__main__":
    sys.exit(main())
