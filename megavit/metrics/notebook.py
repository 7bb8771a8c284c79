"""A progress bar in a Jupyter notebook, by IPython's display alone: without widgets, and kept in the saved notebook."""

import html
import time
from typing import Any

# A browser is sent no more than ten bars a second.
_PAUSE_S = 0.1


class NotebookProgress:
    """Show the steps that are done, with the calls of rich's `Progress` that `MetricLogger` makes.

    Args:
        completed: steps done before the start.
        total: steps of the whole run.
    """

    def __init__(self, *, completed: int, total: int) -> None:
        self._total = total
        self._shown: dict[str, Any] = {"completed": completed, "description": "", "left": ""}
        self._handle: Any = None
        self._drawn_at = 0.0

    def start(self) -> None:
        """Show the bar below the cell."""
        from IPython.display import display

        self._handle = display(self._bundle(), raw=True, display_id=True)

    def update(self, _task: object, **fields: Any) -> None:
        """Change what the bar shows: `completed`, `description` or `left`."""
        self._shown |= fields
        if time.monotonic() - self._drawn_at >= _PAUSE_S:
            self._draw()

    def stop(self) -> None:
        """Show the last state."""
        self._draw()

    def _draw(self) -> None:
        if self._handle is not None:
            self._handle.update(self._bundle(), raw=True)
        self._drawn_at = time.monotonic()

    def _bundle(self) -> dict[str, str]:
        """Return the bar as HTML, and its label for where HTML is not shown."""
        done, texts = self._shown["completed"], (self._shown["description"], self._shown["left"])
        label = "  ".join([f"step {done} of {self._total}", *filter(None, texts)])
        bar = f'<progress value="{done}" max="{self._total}"></progress> <code>{html.escape(label)}</code>'
        return {"text/html": bar, "text/plain": label}
