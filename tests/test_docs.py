"""What the documents name exists: modules, files, settings, pages; the generated pages follow from the code."""

import dataclasses
import importlib
import importlib.util
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from megavit.cluster import azureml_config, kubernetes_config
from megavit.cluster import config as cluster_config
from megavit.config.compose import compose
from megavit.config.search_path import choices
from megavit.config.settings import flatten

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "launch/README.md", "docker/README.md"]
DOCUMENTS += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.name != "log.md")
GROUPS = "run|train|parallel|model|task|data|optim|checkpoint|metrics|cluster"
# What looks like a setting and is a file: `train.log`, `data.png`.
FILES = r"(?:log|txt|csv|png|yaml|npz|pth|py|nemo|safetensors|tar|json|jsonl|sh|parquet|ckpt)"


def code(document: str) -> list[str]:
    """Inline code and lines of shell blocks."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", prose)


def modules_named(texts: list[str]) -> set[str]:
    return {name for text in texts for name in re.findall(r"(?<![\w./-])megavit(?:\.(?!sif|sqsh)[A-Za-z_]\w*)+", text)}


def paths_named(texts: list[str]) -> set[str]:
    folders = "megavit|tests|benchmarks|conf|docs|launch|docker"
    found = {
        name for text in texts for name in re.findall(rf"(?<![\w./=:-])(?:{folders})/[\w./-]*(?![\w*{{./-])", text)
    }
    return {name for name in found if "X" not in name and ("." in name or name.endswith("/"))}


def settings_named(texts: list[str]) -> set[str]:
    # Hydra's +key=value adds a setting that does not exist.
    pattern = rf"(?<![\w./:+-])((?:{GROUPS})\.[a-z][a-z_0-9]*)(?![\w(/])(?!\.\w)"
    found = {name for text in texts for name in re.findall(pattern, text)}
    return {name for name in found if not re.search(rf"\.{FILES}$", name)}


@cache
def settings() -> set[str]:
    """Every setting of a run, whichever task and optimizer is chosen, and of a job."""
    found = {key for task in choices("task") for key in flatten(compose([f"task={task}"]))}
    found |= {key for name in choices("optim") for key in flatten(compose([f"optim={name}", "optim.base_lr=1e-3"]))}
    classes = [
        value
        for module in (cluster_config, azureml_config, kubernetes_config)
        for _, value in inspect.getmembers(module, dataclasses.is_dataclass)
    ]
    return found | {f"cluster.{field.name}" for one in classes for field in dataclasses.fields(one)}


def resolves(name: str) -> bool:
    module, *rest = name.split(".")
    found = importlib.import_module(module)
    while rest:
        if not hasattr(found, rest[0]):
            try:
                importlib.import_module(f"{module}.{rest[0]}")
            except ModuleNotFoundError:
                return False
        found, module = getattr(found, rest[0]), f"{module}.{rest[0]}"
        rest = rest[1:]
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_module_and_path_in_code_exists(document):
    modules, paths = modules_named(code(document)), {ROOT / name for name in paths_named(code(document))}
    if document in ("docs/extending.md", "docs/configuration.md"):
        # They name files that their reader will write: the folders exist.
        modules, paths = {name.rpartition(".")[0] for name in modules}, {path.parent for path in paths}
    if document == "docs/configuration.md":
        # It names the user's own files.
        paths = {path for path in paths if not path.is_relative_to(ROOT / "conf")}
    assert [name for name in sorted(modules) if not resolves(name)] == []
    assert [path for path in sorted(paths) if not path.exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_setting_in_code_exists(document):
    known = settings()
    assert [name for name in sorted(settings_named(code(document))) if name not in known] == []


def test_what_does_not_exist_is_found():
    texts = [
        "megavit.train.keeping",
        "`megavit.data.loader:Loader`",
        "see megavit/keeping.py",
        "optim.decay=cosine",
        "train.log",
    ]
    assert [name for name in sorted(modules_named(texts)) if not resolves(name)] == ["megavit.train.keeping"]
    assert paths_named(texts) == {"megavit/keeping.py"}
    assert settings_named(texts) - settings() == {"optim.decay"}


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_no_generated_page_is_stale_and_a_changed_one_is_found(tmp_path, monkeypatch):
    generate = generator()
    pages = generate.pages()
    committed = {name: (ROOT / "docs" / name).read_text() for name in pages}
    assert [name for name in pages if committed[name] != pages[name]] == [], "run python docs/generate.py"
    for name, text in committed.items():
        (tmp_path / name).write_text(text.replace("recipe", "receipt"))
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    monkeypatch.setattr(generate, "pages", lambda: pages)
    assert generate.stale() == ["settings.md", "commands.md", "recipes.md"]


def test_every_setting_of_a_run_and_of_a_job_has_a_text_in_the_reference():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \| (.*) \| (.*) \|$", (ROOT / "docs" / "settings.md").read_text(), re.M)
    documented = {key for key, kind, _, text in rows if kind.strip() and len(text.strip()) > 5}
    assert settings() - documented == set()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_page_or_a_heading_of_it_has_a_target(document):
    page = ROOT / document
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"(?:\]\(|src=\")([^)\s\"]+)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_every_page_is_in_the_navigation_of_the_site():
    named = set(re.findall(r'"([\w-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}
