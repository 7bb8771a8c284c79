"""Map a source's labels to other classes: those of a trained classifier, or of the training images."""

from collections.abc import Sequence

from torch import Tensor

from megavit.data.class_names import find_places, some
from megavit.data.decode import Jpeg
from megavit.data.sources.base import Source, dense_target, dense_targets, label_set, name_of, open_sample
from megavit.errors import ConfigError


class Relabelled:
    """The samples of a source with other labels.

    Args:
        source: the samples.
        places: the new label of each of the source's labels.
        classes: names, in the order of the new labels.
    """

    def __init__(self, source: Source, places: Sequence[int], classes: tuple[str, ...]) -> None:
        self._source, self._places = source, places
        self.classes, self.image_shape = classes, source.image_shape
        self.dense_targets = dense_targets(source)

    def __len__(self) -> int:
        return len(self._source)

    def image(self, index: int) -> Tensor:
        """Return one image_CYX, uint8."""
        return self._source.image(index)

    def opened(self, index: int) -> Tensor | Jpeg:
        """Return one image; not decoded yet if the source supports that."""
        return open_sample(self._source, index)

    def dense_target(self, index: int, name: str) -> Tensor:
        """Return the source's dense target, target_YX."""
        return dense_target(self._source, index, name)

    def label(self, index: int) -> int:
        """Return the new label."""
        return self._places[self._source.label(index)]

    def labels(self, index: int) -> list[int]:
        """Return all new labels of a sample."""
        return [self._places[label] for label in label_set(self._source, index)]

    def name(self, index: int) -> str:
        """Return the source's name of a sample."""
        return name_of(self._source, index)


def relabel(source: Source, classes: Sequence[str], *, data: str, trained: str) -> Source:
    """Map a source's labels to other classes, by the classes' names.

    Args:
        source: source with some or all of the classes, in any order.
        classes: names, in the order of the new labels.
        data: description of the source, for the error.
        trained: description of the model or data with these classes, for the error.

    Raises:
        ConfigError: if the source has no labels, or a class that is not among `classes`.
    """
    if source.classes == tuple(classes):
        return source
    if not source.classes:
        raise ConfigError(f"{data} has no labels, and {trained} has the classes {some(classes)}; choose labelled data")
    places = find_places(source.classes, classes)
    if places is None:
        known = set(classes)
        unknown = [name for name in source.classes if name not in known]
        raise ConfigError(
            f"{data} has {len(source.classes)} classes, of which {trained} does not know {len(unknown)}: "
            f"{some(unknown)}; it knows {len(classes)}: {some(classes)}. Name them as there, or choose "
            f"the known ones with data.classes=[…]"
        )
    return Relabelled(source, places, tuple(classes))
