"""Select part of a source: some of its classes, some samples of each."""

import zlib

import numpy as np
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.decode import Jpeg
from megavit.data.sources.base import Source, all_labels, dense_target, dense_targets, name_of, open_sample
from megavit.errors import ConfigError, printable
from megavit.validation import suggest

_SUBSET_SEED = 1


class Subset:
    """The chosen samples of a source, under the labels of the chosen classes.

    Args:
        source: the full source.
        indices: indices of the chosen samples in the source.
        labels: labels of the chosen samples, among `classes`.
        classes: names, in label order.
    """

    def __init__(self, source: Source, indices: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
        self._source, self._indices, self._labels = source, indices, labels
        self.classes, self.image_shape = classes, source.image_shape
        self.dense_targets = dense_targets(source)

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Tensor:
        """Return one image_CYX, uint8."""
        return self._source.image(int(self._indices[index]))

    def opened(self, index: int) -> Tensor | Jpeg:
        """Return one image; not decoded yet if the full source supports that."""
        return open_sample(self._source, int(self._indices[index]))

    def dense_target(self, index: int, name: str) -> Tensor:
        """Return the full source's dense target, target_YX."""
        return dense_target(self._source, int(self._indices[index]), name)

    def label(self, index: int) -> int:
        """Return the position of the sample's class among the chosen ones."""
        return int(self._labels[index])

    def label_counts(self) -> np.ndarray:
        """Return the number of images of each class."""
        return np.bincount(self._labels, minlength=len(self.classes))

    def name(self, index: int) -> str:
        """Return the full source's name of a sample."""
        return name_of(self._source, int(self._indices[index]))


def choose(source: Source, config: DataConfig, split: str) -> Source:
    """Select the samples that `data.classes`, `data.samples_per_class` and `data.fraction` name.

    Classes are removed from both splits, samples from training only. The samples are chosen with a fixed seed, so that
    a larger fraction contains every smaller one.

    Args:
        source: one full split.
        config: the data group.
        split: `train` or `val`.

    Raises:
        ConfigError: for a class that does not exist, or more samples than a class has.
    """
    thins = split == "train" and (config.samples_per_class is not None or config.fraction is not None)
    if config.classes is None and not thins:
        return source
    # A name that is not UTF-8 may be typed as it is or as it is printed.
    names = source.classes if config.classes is None else tuple(map(printable, config.classes))
    for name in names:
        if name not in source.classes:
            near = suggest(name, source.classes)
            some = f"its first classes are {', '.join(source.classes[:10])}" if source.classes else "it has no classes"
            hint = f"did you mean {near}?" if near else some
            raise ConfigError(f"data.classes: {name} is no class of data.source={config.source}; {hint}")
    every = all_labels(source)
    indices, labels = [], []
    # Without labels all samples belong to one class without a name.
    for label, name in enumerate(names or ("",)):
        members = np.flatnonzero(every == (source.classes.index(name) if names else 0))
        if thins:
            members = _thin(members, name, config)
        indices.append(members)
        labels.append(np.full(len(members), label))
    # Keep the order of the full source.
    chosen, of = np.concatenate(indices), np.concatenate(labels)
    order = chosen.argsort()
    return Subset(source, chosen[order], of[order], names)


def _thin(members: np.ndarray, name: str, config: DataConfig) -> np.ndarray:
    count = config.samples_per_class
    if count is None:
        assert config.fraction is not None
        count = max(1, round(len(members) * config.fraction))
    if count > len(members):
        raise ConfigError(
            f"data.samples_per_class={count} is more than the {len(members)} training images of class "
            f"{name or '(none)'}; lower it"
        )
    # The key contains the class's name, so that the choice does not depend on the other classes.
    key = [_SUBSET_SEED, zlib.crc32(name.encode())]
    return np.random.Generator(np.random.Philox(key=key)).permutation(members)[:count]
