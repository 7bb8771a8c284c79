"""List the packages to install in an image, and those of its base image that pip must not replace.

The Dockerfiles run this script; it imports only modules that both base images have.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

# The base image builds these together against its CUDA: a wheel from PyPI in place of one breaks the others.
KEPT = re.compile(r"torch|torchvision|torchaudio|triton|pytorch-triton|numpy|apex|flash-attn.*|transformer-engine.*")
TORCH = ("torch", "torchvision")


def name_of(requirement: str) -> str:
    """Return the normalised name of a requirement or a distribution."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def write_requirements(folder: Path, extras: str) -> None:
    """Write setup.py's requirements to torch.txt and others.txt; torch is large and rarely changes.

    Args:
        folder: folder for the two files.
        extras: setup.py's extras to add, separated by commas.
    """
    import distutils.core

    # setuptools provides distutils, which Python 3.12 no longer contains.
    import setuptools  # noqa: F401

    package = distutils.core.run_setup("setup.py", stop_after="init")
    wanted = list(package.install_requires)
    for extra in filter(None, extras.split(",")):
        if extra not in package.extras_require:
            there = ", ".join(package.extras_require)
            raise SystemExit(f"EXTRAS={extras}: setup.py has no extra {extra!r}; it has {there}")
        wanted += package.extras_require[extra]
    folder.mkdir(parents=True, exist_ok=True)
    for file, chosen in (
        ("torch.txt", [text for text in wanted if name_of(text) in TORCH]),
        ("others.txt", [text for text in wanted if name_of(text) not in TORCH]),
    ):
        (folder / file).write_text("".join(f"{text}\n" for text in chosen))


def installed() -> dict[str, str]:
    """Return the version of every installed package that pip must not replace."""
    found = {name_of(package.metadata["Name"]): package.version for package in distributions()}
    return {name: found[name] for name in sorted(found) if KEPT.fullmatch(name)}


def write_constraints(file: Path) -> None:
    """Write pip's constraints for the packages that it must not replace.

    `pip freeze` does not serve: for packages built in the base image it names wheels that no longer exist.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}=={version}\n" for name, version in installed().items()))


def check(file: Path) -> None:
    """Check that pip replaced no constrained package, and that torch is built with CUDA; exit with an error if not."""
    before = dict(line.split("==") for line in file.read_text().splitlines())
    after = installed()
    replaced = [f"{name} {before[name]} became {after.get(name)}" for name in before if after.get(name) != before[name]]
    if replaced:
        raise SystemExit(f"pip replaced packages of the base image: {'; '.join(replaced)}")
    import torch

    if torch.version.cuda is None:
        raise SystemExit(f"torch {torch.__version__} of this base was built without CUDA; choose another BASE")
    print("kept: " + ", ".join(f"{name} {version}" for name, version in after.items()))
    for name in ("transformer-engine", "flash-attn", "apex"):
        if name not in after:
            print(f"not in this base: {name}")


if __name__ == "__main__":
    command, path, *more = sys.argv[1:]
    if command == "requirements":
        write_requirements(Path(path), *more)
    else:
        {"keep": write_constraints, "check": check}[command](Path(path))
