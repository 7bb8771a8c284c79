"""Train a model: this package is the training loop, and it is callable as `megavit.train(…)` (see `TrainPackage`)."""

import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megavit.train.callbacks import Callback
    from megavit.train.run import Run


class TrainPackage(ModuleType):
    """This package, callable: `megavit.train(…)`.

    A function of that name would be replaced by the package as soon as any of its modules is imported.
    """

    def __call__(
        self,
        /,
        *arguments: "str | os.PathLike[str]",
        callbacks: "Sequence[Callback]" = (),
        **settings: Any,
    ) -> "Run":
        """Train a model; the same as `megavit train` with the same settings, to the bit.

        With one rank the run is in this process, which is afterwards as it was; several ranks (`run.ranks`, or one for
        each GPU) are processes that the command starts. Ctrl-C, or interrupting the kernel in Jupyter, saves and
        returns: `run.stopped` is true then, and the same call resumes. A second one raises KeyboardInterrupt at once.

        Examples:
            `megavit.train("digits", "optim.lr=1e-3", steps=200)`,
            `megavit.train(data="folder", path="IMAGES", val_fraction=0.2, model="vit_ti16", epochs=10)`,
            `megavit.train("digits", **{"parallel.tp": 2, "run.ranks": 2})`

        Args:
            arguments: first a recipe's name or file, which may be left out; then `key=value`, as on the command line.
            callbacks: called at the end of each step with a `megavit.train.callbacks.StepReport`: functions, or objects
                or classes with a method `on_step_end`. One process only.
            settings: values by a setting's path (`**{"optim.lr": 1e-3}`), by its last word where only one setting has
                it (`steps=200` is `train.steps=200`), or by a group (`model="vit_s16"`). A part of your own is passed
                as its class or function by `source=`, `transform=`, `task=` or `optimizer=`; with several ranks it must
                be one that another process can import.

        Returns:
            The run, finished or stopped.

        Raises:
            ConfigError: for wrong settings or data; the message names the setting and the way out.
            RunError: if a rank in another process fails.
            FloatingPointError: if the loss of a run in this process diverges (`train.on_nonfinite`).
        """
        from megavit.train.start import start

        return start(arguments, settings, callbacks=callbacks)


sys.modules[__name__].__class__ = TrainPackage
