"""Classify image files with a trained classifier.

Shapes: B images of a batch, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megavit.errors import ConfigError, printable
from megavit.inference.load import open_encoder
from megavit.inference.trained_run import read_classes, read_run, with_settings
from megavit.task.config import ClassificationConfig, Loss

_BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        path: the image's file, as text that can be printed.
        classes: names of the classes, the most probable one first.
        probabilities: of these classes; they are softmax values, or of a run with `task.loss=bce` sigmoids.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


class Classifier:
    """A run's classifier; its weights are read when images are classified.

    Args:
        place: a run's folder or one of its checkpoints, with the prefix `ema:` for the moving average.
        settings: of `PIXEL_SETTINGS`, as typed, where the run's do not fit the images.

    Attributes:
        classes: names, in the order of the scores.

    Raises:
        ConfigError: if the run is no classifier's, or a setting does not fit.
    """

    def __init__(self, place: str, settings: Sequence[str]) -> None:
        self._weights, config = read_run(place, classifies=True, does="predicts")
        self._config = with_settings(config, list(settings))
        self.classes = read_classes(self._weights.checkpoint)

    @torch.no_grad()
    def classify(self, paths: Sequence[Path], *, top: int) -> Iterator[Prediction | ConfigError]:
        """Yield the result of each image, in batches: first the errors of a batch's unreadable images, then the others.

        Args:
            paths: image files.
            top: number of classes of each prediction.
        """
        encoder, layout = open_encoder(self._config, self._weights)
        model, top = encoder.to(layout.device), min(top, len(self.classes))
        # Trained with binary cross-entropy, each class has a probability of its own.
        assert isinstance(self._config.task, ClassificationConfig)
        uses_sigmoid = self._config.task.loss is Loss.bce
        for first in range(0, len(paths), _BATCH):
            images, read = [], []
            for path in paths[first : first + _BATCH]:
                try:
                    images.append(model.read(path))
                    read.append(path)
                except ConfigError as error:
                    yield error
            if not images:
                continue
            logits_BK = model(torch.cat(images).to(layout.device))
            best = (logits_BK.sigmoid() if uses_sigmoid else logits_BK.softmax(dim=1)).topk(top, dim=1)
            for path, scores, labels in zip(read, best.values.tolist(), best.indices.tolist(), strict=True):
                yield Prediction(printable(str(path)), tuple(self.classes[k] for k in labels), tuple(scores))
