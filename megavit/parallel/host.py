"""Read this machine's memory and CPU limits, without torch, because doctor uses this module too."""

from pathlib import Path

# Without a limit, version 1 of cgroups reports about 2^63.
_UNLIMITED_BYTES = 2**60


def available_bytes() -> int:
    """Return the bytes of memory that processes of this machine, or of this control group, can still allocate."""
    import psutil

    _, limit = cgroup_limits()
    available: int = psutil.virtual_memory().available
    return available if limit is None else min(available, limit)


def cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> tuple[float | None, int | None]:
    """Return the lowest limits of this process's control groups, version 1 or 2: CPUs, and bytes of memory.

    Args:
        root: where control groups are mounted.
        membership: file that lists this process's control groups.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return None, None
    quotas, limits = [], []
    for _, controllers, path in lines:
        # In a container the path may be the host's, while the group itself is mounted at the root.
        parts = Path(path.lstrip("/")).parts
        inner = [Path(*parts[:count]) for count in range(len(parts) + 1)]
        for folder in (root / name / part for name in controllers.split(",") for part in inner):
            quotas += _quota(folder)
            limits += [
                int(text)
                for name in ("memory.max", "memory.limit_in_bytes")
                if (text := _read(folder / name)).isdigit()
            ]
    limits = [limit for limit in limits if limit < _UNLIMITED_BYTES]
    return min(quotas, default=None), min(limits, default=None)


def _quota(folder: Path) -> list[float]:
    share, _, period = _read(folder / "cpu.max").partition(" ")
    if not share:
        share, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return [int(share) / int(period)] if share.isdigit() and period.isdigit() else []


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
