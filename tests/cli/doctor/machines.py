"""Make fake packages, and findings of checks that were not run."""

from pathlib import Path

from megavit.cli.doctor.finding import Finding, State


def pretend(folder: Path, name: str, version: str, files: dict[str, str] | None = None) -> Path:
    """Write a distribution to a folder for Python's path: its metadata, and its files by path."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, source in (files or {}).items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def on_cpu() -> list[Finding]:
    """Return the device's findings on a machine without a GPU."""
    return [Finding("devices", "training on", State.ok, "the CPU", figures={"device": "cpu", "count": 0})]


def only(findings: list[Finding], name: str) -> Finding:
    """Return the only finding with this name."""
    (found,) = [finding for finding in findings if finding.name == name]
    return found
