"""Track images that could not be read: name and count them, and stop the run if there are too many."""

import json
from pathlib import Path

from megavit.data.config import OnBadSample
from megavit.data.loader import Loader
from megavit.data.prefetch import BadSample
from megavit.parallel.collectives import gather_objects

# Images that are named per call; the others are only in the file.
_NAMED = 10


class BadSampleTracker:
    """The replaced images of one split since the start of the process; the same on every rank.

    Args:
        loader: the loader, which replaces the images.
        split: `train` or `val`.
        run_dir: folder of `bad_samples.jsonl`, which lists all of them.
    """

    def __init__(self, loader: Loader, split: str, *, run_dir: Path) -> None:
        self._loader, self._split, self._file = loader, split, run_dir / "bad_samples.jsonl"
        self._known: set[int] = set()
        self._skips = loader.config.on_bad_sample is OnBadSample.skip

    def collect(self, step: int) -> list[str]:
        """Gather the images that all ranks have replaced since the last call; every rank calls this.

        Args:
            step: optimizer steps done.

        Returns:
            Warnings about the new ones.
        """
        if not self._skips:
            return []
        by_rank = gather_objects(self._loader.pop_bad_samples())
        found = {bad.sample_id: bad for some in by_rank for bad in some if bad.sample_id not in self._known}
        new = [found[sample_id] for sample_id in sorted(found)]
        self._known |= set(found)
        if new and self._loader.layout.rank == 0:
            self._list(new, step)
        lines = [f"{self._split}: {bad.reason}; sample {bad.replaced_by} takes its place" for bad in new[:_NAMED]]
        if len(new) > _NAMED:
            lines.append(f"{self._split}: {len(new) - _NAMED} more bad images, see {self._file}")
        return lines

    @property
    def metrics(self) -> dict[str, float]:
        """Return `bad_samples`, the number of images, if on_bad_sample is skip."""
        return {"bad_samples": float(len(self._known))} if self._skips else {}

    @property
    def too_many(self) -> str | None:
        """Return why the run must stop; None if it may continue."""
        bad, total, limit = len(self._known), len(self._loader.source), self._loader.config.max_bad_fraction
        if limit is None or bad <= limit * total:
            return None
        return (
            f"{bad} of {total} {self._split} images are bad, {bad / total:.2%}, and data.max_bad_fraction={limit} "
            f"allows {int(limit * total)}; {self._file} lists them. Repair them or raise the limit, and resume from "
            f"the last checkpoint"
        )

    def _list(self, new: list[BadSample], step: int) -> None:
        with self._file.open("a") as file:
            for bad in new:
                row = {"step": step, "split": self._split, "sample_id": bad.sample_id, "reason": bad.reason}
                file.write(json.dumps({**row, "replaced_by": bad.replaced_by}) + "\n")
