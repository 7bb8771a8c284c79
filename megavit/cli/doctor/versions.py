"""Check the versions of Python and of the packages that megavit needs by their metadata, without importing them."""

import platform
from importlib.metadata import PackageNotFoundError, requires, version

from megavit.cli.doctor.finding import Finding, State
from megavit.metrics.provenance import provenance

# Packages with a finding each; the others share one finding if their versions are right.
_SHOWN = ("torch", "torchvision", "megatron-core")


def check_versions() -> list[Finding]:
    """Compare the installed versions with the requirements in megavit's metadata."""
    source = provenance()
    try:
        required = requires("megavit") or []
    except PackageNotFoundError:
        python = Finding("versions", "python", State.ok, platform.python_version())
        message = "megavit is not installed, so its requirements are not known: no version was compared"
        return [python, Finding("versions", "megavit", State.missing, message, "pip install -e . in megavit's clone")]
    commit = f", commit {source['commit'][:12]}{'+' * source['commit'].endswith('+')}" if source["commit"] else ""
    of_megavit = Finding("versions", "megavit", State.ok, f"{version('megavit')}{commit}", figures=source)
    return [_python(), of_megavit, *_packages(required)]


def _python() -> Finding:
    from importlib.metadata import metadata

    from packaging.specifiers import SpecifierSet

    wanted, found = metadata("megavit")["Requires-Python"] or "", platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("versions", "python", State.ok, found)
    message = f"{found}, and megavit needs {wanted}"
    return Finding("versions", "python", State.broken, message, "make an environment with a newer Python")


def _packages(required: list[str]) -> list[Finding]:
    from packaging.requirements import Requirement

    listed, good, bad = [], {}, []
    for line in required:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        name = needed.name
        finding = _package(name, str(needed.specifier), line)
        if name in _SHOWN:
            listed.append(finding)
        elif finding.state is State.ok:
            good[name] = finding.text
        else:
            bad.append(finding)
    rest = ", ".join(f"{name} {found}" for name, found in good.items())
    others = [Finding("versions", "other packages", State.ok, rest, figures=good)] if good else []
    return [*sorted(listed, key=lambda finding: _SHOWN.index(finding.name)), *others, *bad, *_optional(required)]


def _package(name: str, wanted: str, line: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    install = f"pip install '{line}'"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding("versions", name, State.broken, "not installed", install, {"wanted": wanted})
    figures = {"found": found, "wanted": wanted}
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Finding("versions", name, State.ok, found, figures=figures)
    return Finding(
        "versions", name, State.broken, f"{found} is installed, and megavit needs {wanted}", install, figures
    )


def _optional(required: list[str]) -> list[Finding]:
    """Check the versions of optional packages without kernels; packages with kernels are also called."""
    from packaging.requirements import Requirement

    findings = []
    for needed in map(Requirement, required):
        if needed.name != "wandb" or needed.marker is None:
            continue
        found = _package(needed.name, str(needed.specifier), needed.name)
        if found.state is not State.ok:
            advice = "only needed by metrics.wandb=PROJECT: pip install 'megavit[wandb]'"
            found = Finding("versions", needed.name, State.missing, found.text, advice, found.figures)
        findings.append(found)
    return findings
