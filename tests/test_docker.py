"""What can be said of the images without an engine; docker/README.md says what was built."""

import importlib.util
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import megavit

ROOT = Path(__file__).parent.parent
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cpu")
SPEC = importlib.util.spec_from_file_location("docker_packages", ROOT / "docker" / "packages.py")
packages = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(packages)


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Its instructions in order, without comments, lines joined: name and the rest."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / dockerfile).read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def copied(dockerfile: str) -> list[str]:
    """What it copies from the repository."""
    rest = [text.split() for name, text in instructions(dockerfile) if name == "COPY"]
    return [path for words in rest if not words[0].startswith("--from") for path in words[:-1]]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path from the builder: the last line that fits it or a folder above it decides."""
    shut_out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        above = [Path(path), *Path(path).parents][:-1]
        # `**/` is any folder or none.
        if any(fnmatch(str(part), pattern) or fnmatch(part.name, pattern.removeprefix("**/")) for part in above):
            shut_out = not line.startswith("!")
    return shut_out


def make(target: str, *settings: str, path: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", target, *settings], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )


@pytest.fixture
def engine(tmp_path):
    """A `docker` on the path that writes down what it is asked for: `engine(code)`, code of `docker info`."""

    def install(code: int) -> Path:
        asked = tmp_path / "asked"
        script = f'#!/bin/sh\necho "$@" >> {asked}\n[ "$1" != info ] || exit {code}\n'
        (tmp_path / "docker").write_text(script)
        (tmp_path / "docker").chmod(0o755)
        return asked

    return install


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_is_copied_exists_and_reaches_the_builder(dockerfile):
    paths = copied(dockerfile)
    assert {"setup.py", "README.md", "megavit", "conf", "launch"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
        assert not ignored(path), path


@pytest.mark.parametrize(
    "path",
    [
        ".git/HEAD",
        "runs/digits/checkpoints/latest",
        ".venv/bin/python",
        "tests/conftest.py",
        "megavit/__pycache__/a.pyc",
    ],
)
def test_what_no_image_needs_stays_out_of_the_builder(path):
    assert ignored(path)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_base_is_one_exact_tag_and_may_be_chosen(dockerfile):
    found = instructions(dockerfile)
    (base,) = [text for name, text in found[:1] if name == "ARG"]
    assert re.fullmatch(r"BASE=[\w./-]+:\d+\.\d+-[\w-]+", base), base
    stages = {text.split(" AS ")[1] for name, text in found if name == "FROM" and " AS " in text}
    assert {text.split(" AS ")[0] for name, text in found if name == "FROM"} <= {"${BASE}", *stages}


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_whoever_runs_it_is_not_root_and_may_be_anyone(dockerfile):
    found = instructions(dockerfile)
    user = [text for name, text in found if name == "USER"][-1]
    # A number: Kubernetes' runAsNonRoot cannot judge a name.
    assert int(user) > 1000
    text = (ROOT / dockerfile).read_text()
    assert f"--uid {user} --create-home megavit" in text
    assert "chmod 1777 /home/megavit" in text
    assert "--mode 1777 /workspace" in text
    assert ("ENV", "HOME=/home/megavit USER=megavit") in found
    assert not any(name in {"ENTRYPOINT", "EXPOSE", "HEALTHCHECK"} for name, _ in found)


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_dependencies_come_from_setup_py_and_before_the_source(dockerfile):
    found = instructions(dockerfile)
    last = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    steps = [f"{name} {text}" for name, text in found[last:]]
    pip = [text for text in steps if "pip install" in text]
    # From lists that docker/packages.py wrote; the source alone, and nothing else, comes last.
    assert all(re.search(r"-r /opt/megavit/(requirements/)?(torch|others)\.txt", text) for text in pip[:-1])
    assert "--no-deps" in pip[-1]
    assert steps.index(pip[-2]) < min(index for index, text in enumerate(steps) if "--from=wheel" in text)
    # What the final stage takes from the repository itself is no code of megavit's.
    assert {text for text in steps if text.startswith("COPY") and "--from" not in text} <= {
        "COPY docker/packages.py /opt/megavit/"
    }
    # Nor does what the list is written from hold any but what setup.py reads.
    start = next(index for index, (name, text) in enumerate(found) if name == "FROM" and "AS requirements" in text)
    listed = found[start + 1 :]
    listed = listed[: next(index for index, (name, _) in enumerate(listed) if name == "FROM")]
    sources = {path for name, text in listed if name == "COPY" for path in text.split()[:-1]}
    assert sources == {"setup.py", "README.md", "megavit/__init__.py", "docker/packages.py"}


def test_the_requirements_are_setup_pys_and_the_extras_asked_for(tmp_path):
    command = [sys.executable, "docker/packages.py", "requirements", str(tmp_path)]
    subprocess.run([*command, "wandb"], cwd=ROOT, check=True)
    torch, others = ((tmp_path / name).read_text().split() for name in ("torch.txt", "others.txt"))
    assert [packages.name_of(text) for text in torch] == ["torch", "torchvision"]
    assert "megatron-core==0.16.1" in others
    assert others[-1].startswith("wandb")
    assert set(torch).isdisjoint(others)
    refused = subprocess.run([*command, "wandbb"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "setup.py has no extra 'wandbb'; it has flash, te, wandb, sweep, dev" in refused.stderr


def test_an_image_in_which_pip_replaced_torch_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "constraints.txt"
    brought = {"numpy": "2.1.0", "torch": "2.13.0a0+8145d630e8.nv26.06"}
    monkeypatch.setattr(packages, "installed", lambda: brought)
    packages.write_constraints(file)
    assert file.read_text() == "numpy==2.1.0\ntorch==2.13.0a0+8145d630e8.nv26.06\n"
    monkeypatch.setattr(packages, "installed", lambda: {**brought, "torch": "2.15.0"})
    with pytest.raises(
        SystemExit, match=r"replaced packages of the base image: torch 2\.13\.0a0\+8145d630e8\.nv26\.06 became 2\.15\.0"
    ):
        packages.check(file)


def test_what_must_stay_is_found_under_any_spelling(monkeypatch):
    class Package:
        def __init__(self, name: str) -> None:
            self.metadata, self.version = {"Name": name}, "1"

    names = [
        "Torch",
        "transformer_engine_torch",
        "flash_attn",
        "apex",
        "pytorch_triton",
        "torchmetrics",
        "timm",
        "numpy",
    ]
    monkeypatch.setattr(packages, "distributions", lambda: [Package(name) for name in names])
    kept = {"torch", "transformer-engine-torch", "flash-attn", "apex", "pytorch-triton", "numpy"}
    assert set(packages.installed()) == kept


@pytest.mark.parametrize(("target", "dockerfile"), zip(("image", "image-cpu"), DOCKERFILES, strict=True))
def test_make_builds_with_the_version_and_the_revision(target, dockerfile, engine, tmp_path):
    asked = engine(0)
    done = make(target, "BUILD_ARGS=--build-arg EXTRAS=wandb", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    build = asked.read_text().splitlines()[-1]
    tag = f"megavit:{megavit.__version__}" + ("-cpu" if target == "image-cpu" else "")
    assert build.startswith(f"build --file {dockerfile} --tag {tag} --build-arg VERSION={megavit.__version__} ")
    assert re.search(r"--build-arg REVISION=([0-9a-f]{40}(-dirty)?|unknown) ", build), build
    assert build.endswith("--build-arg EXTRAS=wandb .")


def test_make_image_says_in_one_line_that_docker_is_missing_or_its_engine_silent(engine, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("make", "sh", "sed", "git", "echo"):
        found = subprocess.run(["which", tool], capture_output=True, text=True).stdout.strip()
        (tools / tool).symlink_to(found or "/bin/true")
    missing = make("image", path=str(tools))
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[0].startswith("make image: docker is not installed; ")
    asked = engine(1)
    silent = make("image", path=f"{tmp_path}:{tools}")
    assert silent.returncode == 2
    assert silent.stderr.splitlines()[0].startswith("make image: docker is installed but its engine does not answer; ")
    assert asked.read_text() == "info\n"


def test_the_page_names_targets_that_the_makefile_has():
    text = (ROOT / "docker" / "README.md").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert {"image", "image-cpu"} <= targets
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert targets <= there
    tag = dict(instructions("docker/Dockerfile")[:1])["ARG"].removeprefix("BASE=")
    assert tag in text
