"""Which packages an image gets: those that setup.py lists, beside those of its base that must stay.

Run by the Dockerfiles; it imports nothing but what both bases have.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

# Built together, against the base's CUDA: a wheel from the package index in the place of one breaks the others.
KEPT = re.compile(r"torch|torchvision|torchaudio|triton|pytorch-triton|numpy|apex|flash-attn.*|transformer-engine.*")
TORCH = ("torch", "torchvision")


def name_of(requirement: str) -> str:
    """A requirement's or a distribution's name, as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def write_requirements(folder: Path, extras: str) -> None:
    """Write setup.py's requirements: torch.txt and others.txt, since torch is large and seldom changes.

    Args:
        folder: where the two files go.
        extras: setup.py's extras to add, separated by commas.
    """
    import distutils.core

    # setuptools provides distutils, which Python itself has no more.
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
    """Version of every installed package that must stay."""
    found = {name_of(package.metadata["Name"]): package.version for package in distributions()}
    return {name: found[name] for name in sorted(found) if KEPT.fullmatch(name)}


def write_constraints(file: Path) -> None:
    """Write what pip may not replace.

    Not from `pip freeze`: for packages built in the base it names wheels that are no longer there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}=={version}\n" for name, version in installed().items()))


def check(file: Path) -> None:
    """Refuse an image in which pip replaced a package that must stay, or whose torch knows no CUDA."""
    before = dict(line.split("==") for line in file.read_text().splitlines())
    after = installed()
    replaced = [f"{name} {before[name]} became {after.get(name)}" for name in before if after.get(name) != before[name]]
    if replaced:
        raise SystemExit(f"pip replaced what must stay: {'; '.join(replaced)}")
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
