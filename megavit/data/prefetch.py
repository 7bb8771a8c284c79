"""Read and transform the samples of micro batches, in this process or in worker processes."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from megavit.data.config import DataConfig, OnBadSample
from megavit.data.decode import Jpeg
from megavit.data.sampler import SampleKey
from megavit.data.sources.base import Source, all_labels, dense_target, dense_targets, label_set, name_of, open_sample
from megavit.data.transforms.image import ImageTransform
from megavit.data.transforms.normalize import draw_shifts, shift_image
from megavit.data.transforms.resize import named_if_too_large
from megavit.errors import ConfigError
from megavit.parallel.rng import RandomStream, hash_int64
from megavit.validation import format_value

# Number of replacement images that are tried: if none can be read, the problem is larger than single images.
_TRIES = 20

# Seconds between checks that the workers are alive, and the messages of torch 2.15 if they are not.
_LOOK_S = 5.0
_TIMED_OUT, _DIED = "DataLoader timed out", "DataLoader worker (pid"


# Name of the target that a source's `label` or `labels` returns.
LABELS = "labels"


@dataclass(frozen=True)
class RequiredFields:
    """Fields of a batch that this rank's pipeline stage reads.

    Attributes:
        images: whether it reads images.
        targets: names of the targets that it reads: `labels`, or the source's dense targets.
    """

    images: bool
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class BadSample:
    """An image that could not be read, and its replacement.

    Attributes:
        sample_id: the image's index in the source.
        reason: the image's name and the error.
        replaced_by: the replacement's index.
    """

    sample_id: int
    reason: str
    replaced_by: int


@dataclass(frozen=True)
class MicroBatch:
    """A micro batch after reading, on the CPU.

    Attributes:
        images: uint8 images_BCYX; None if they are not read.
        targets: targets by name: `labels`, int64 labels_B or uint8 labels_BK; a dense target, target_BYX.
        bad: samples that were replaced.
    """

    images: Tensor | None
    targets: dict[str, Tensor]
    bad: list[BadSample]

    def map(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """Return the micro batch with `change` applied to each tensor."""
        images = None if self.images is None else change(self.images)
        return replace(self, images=images, targets={name: change(target) for name, target in self.targets.items()})

    @property
    def tensors(self) -> list[Tensor]:
        """Return the images, if any, and the targets."""
        return [*([] if self.images is None else [self.images]), *self.targets.values()]

    def pin_memory(self) -> "MicroBatch":
        """Return the micro batch in pinned memory; DataLoader calls this."""
        return self.map(Tensor.pin_memory)


class SampleDataset(Dataset[MicroBatch]):
    """The dataset from which DataLoader reads micro batches.

    Args:
        source: the samples.
        config: the data group.
        fields: fields that this rank's stage reads.
        seed: `run.seed`.
        augment: whether images are augmented, as in training.
    """

    def __init__(self, source: Source, config: DataConfig, fields: RequiredFields, *, seed: int, augment: bool) -> None:
        self.source, self.config, self.fields, self.seed, self.augment = (
            source,
            config,
            fields,
            seed,
            augment,
        )
        self.view = ImageTransform(config, augment=augment)
        self._dense = [name for name in fields.targets if name != LABELS]
        _check_dense(self._dense, source, config)
        self._labels: np.ndarray | None = None
        # The sample that each worker is reading, for the error if the worker dies; −1 for none.
        self.at = torch.full((max(1, config.workers),), -1, dtype=torch.int64).share_memory_()

    def __getitems__(self, keys: list[SampleKey]) -> MicroBatch | ConfigError:
        """Read a micro batch; DataLoader calls this.

        A ConfigError is returned, not raised: DataLoader would bury its message in a worker's traceback.
        """
        try:
            return self._read(keys)
        except ConfigError as error:
            return error

    def _read(self, keys: list[SampleKey]) -> MicroBatch:
        names = self.fields.targets
        # Compute all seeds of the micro batch in one call.
        draws = self.view.sample_seeds(keys, seed=self.seed) if self.fields.images or self._dense else []
        targets = {
            name: self._dense_target(name, keys, draws) if name in self._dense else self._labels_of(keys)
            for name in names
        }
        if not self.fields.images:
            return MicroBatch(None, targets, [])
        bad: list[BadSample] = []
        # Read images one by one: in their original sizes they may not fit into memory together.
        with self.view.drawing():
            images = [self.view.augment(self._cut(key, draw, bad)) for key, draw in zip(keys, draws, strict=True)]
        images = self._shift(images, keys)
        # Not torch.stack: in a worker default_collate writes into shared memory and so saves a copy.
        return MicroBatch(default_collate(images), targets, bad)

    def _shift(self, images: list[Tensor], keys: list[SampleKey]) -> list[Tensor]:
        if not (self.augment and self.config.random_shift):
            return images
        shifts = draw_shifts(keys, pixels=self.config.random_shift, seed=self.seed)
        return [shift_image(image, *shift) for image, shift in zip(images, shifts, strict=True)]

    def _dense_target(self, name: str, keys: list[SampleKey], draws: list[int]) -> Tensor:
        """Return target_BYX, cropped, flipped and shifted as the images are; a shift pads with 0."""
        with self.view.drawing():
            cut = [
                self.view.crop_target(self._read_target(name, key.sample_id), draw).unsqueeze(0)
                for key, draw in zip(keys, draws, strict=True)
            ]
        return torch.cat(self._shift(cut, keys))

    def _read_target(self, name: str, sample_id: int) -> Tensor:
        target, dtype = dense_target(self.source, sample_id, name), dense_targets(self.source)[name]
        if target.ndim != 2 or target.dtype != dtype:
            raise ConfigError(
                f"the target {name} of sample {sample_id} of data.source={self.config.source} is {target.dtype} "
                f"{list(target.shape)}; {dtype} [rows, columns] is needed"
            )
        return target

    def _labels_of(self, keys: list[SampleKey]) -> Tensor:
        """Return int64 labels_B, or with `data.multi_label` uint8 labels_BK, 1 for each of an image's labels."""
        if not self.config.multi_label:
            return torch.tensor([self.source.label(key.sample_id) for key in keys])
        labels_BK = torch.zeros(len(keys), len(self.source.classes), dtype=torch.uint8)
        for row, key in enumerate(keys):
            labels_BK[row, label_set(self.source, key.sample_id)] = 1
        return labels_BK

    def _cut(self, key: SampleKey, draw: int, bad: list[BadSample]) -> Tensor:
        """Read and crop the sample's image, or a replacement if it cannot be read and on_bad_sample is skip."""
        tried: list[tuple[int, str]] = []
        for sample_id in self._candidates(key):
            try:
                with self._current_sample(sample_id):
                    image = open_sample(self.source, sample_id)
                    with named_if_too_large(partial(name_of, self.source, sample_id)):
                        cut = self.view.crop(image, draw) if self._fits(image) else None
            except ConfigError as error:
                if self.config.on_bad_sample is OnBadSample.stop:
                    raise
                tried.append((sample_id, str(error)))
                continue
            bad += [BadSample(failed, reason, replaced_by=sample_id) for failed, reason in tried]
            if cut is None:
                assert isinstance(image, Tensor)
                raise ConfigError(
                    f"sample {sample_id} of data.source={self.config.source} is {image.dtype} {list(image.shape)}, and "
                    f"uint8 [{self.config.channels}, rows, columns] is needed (data.channels={self.config.channels})"
                )
            return cut
        raise ConfigError(f"{tried[0][1]}; {len(tried) - 1} replacements of its class cannot be read either")

    def _candidates(self, key: SampleKey) -> Iterator[int]:
        """Yield the sample and its replacements, a function of its key; all are of its class.

        The last pipeline stage reads only labels, so a replacement with another label would need communication.
        """
        yield key.sample_id
        same_class = self._of_class(self.source.label(key.sample_id))
        for number in range(_TRIES):
            place = (key.epoch, key.sample_id, key.occurrence)
            draw = int(hash_int64(self.seed, *place, RandomStream.BAD_SAMPLE, number))
            yield int(same_class[draw % len(same_class)])

    def _of_class(self, label: int) -> np.ndarray:
        # Read only if an image is bad: a million labels take a second.
        if self._labels is None:
            self._labels = all_labels(self.source)
        return np.flatnonzero(self._labels == label)

    @contextmanager
    def _current_sample(self, sample_id: int) -> Iterator[None]:
        worker = get_worker_info()
        if worker is None:
            yield
            return
        self.at[worker.id] = sample_id
        try:
            yield
        finally:
            self.at[worker.id] = -1

    def _fits(self, image: Tensor | Jpeg) -> bool:
        if isinstance(image, Jpeg):
            return True
        return image.ndim == 3 and image.shape[0] == self.config.channels and image.dtype == torch.uint8


def _check_dense(names: list[str], source: Source, config: DataConfig) -> None:
    """Raise ConfigError for dense targets that the source lacks, and for settings that change only the image."""
    for name in names:
        if name not in dense_targets(source):
            known = ", ".join(dense_targets(source)) or "none"
            raise ConfigError(
                f"the task needs the dense target {name}, and data.source={config.source} has {known}; choose data "
                f"with it, or another task"
            )
    for key in ("auto_augment", "transform") if names else ():
        value = getattr(config, key)
        if value is not None:
            raise ConfigError(
                f"data.{key}={format_value(value)} would change an image but not its target {names[0]}; set it to null"
            )
    if names and config.on_bad_sample is OnBadSample.skip:
        raise ConfigError(
            f"data.on_bad_sample=skip replaces a bad image by another of its class, which has another target "
            f"{names[0]}; set it to stop"
        )


def prefetch(samples: SampleDataset, batches: Iterator[list[SampleKey]], *, pins: bool) -> Iterator[MicroBatch]:
    """Read micro batches in order, in `data.workers` processes, or in this process if there are none.

    Args:
        samples: the dataset.
        batches: the keys of each micro batch.
        pins: whether to put them into pinned memory.

    Raises:
        ConfigError: if an image cannot be read.
        RuntimeError: if a worker process dies or hangs; it names the images that were being read.
    """
    workers = samples.config.workers
    before = signal.getsignal(signal.SIGCHLD)
    reads = iter(
        DataLoader(
            samples,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=workers,
            timeout=min(_LOOK_S, samples.config.timeout_s) if workers else 0,
            pin_memory=pins,
            # DataLoader samples a seed for its workers when it starts. From the default generator this would change
            # the dropout of the step in which it starts, and a resumed run would not be bit-equal.
            generator=torch.Generator(),
            collate_fn=_as_it_is,  # type: ignore[arg-type]
        )
    )
    # torch's own handler raises an error anywhere in this process when a worker ends, even during cleanup. torch
    # installs it in the main thread only.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    while True:
        try:
            read = _next(reads, samples)
        except StopIteration:
            return
        if isinstance(read, ConfigError):
            raise read
        yield read


def _next(reads: Iterator[MicroBatch | ConfigError], samples: SampleDataset) -> MicroBatch | ConfigError:
    """Wait for the next micro batch, and check every few seconds that all workers are alive."""
    started = time.monotonic()
    while True:
        try:
            return next(reads)
        except (RuntimeError, OSError, EOFError) as error:
            waited_s = time.monotonic() - started
            hangs, died = _TIMED_OUT in str(error), _tells_of_a_dead_worker(error, samples)
            if hangs and waited_s < samples.config.timeout_s:
                continue
            if not (hangs or died):
                raise
            names = [name_of(samples.source, at) for at in samples.at.tolist() if at >= 0]
            what = f"no micro batch came for {waited_s:.0f} s" if hangs else "a loading process died"
            raise RuntimeError(
                f"{what}; being read: {', '.join(names) or 'nothing'}. Check these images; if memory has run out "
                f"lower data.workers, if reading is slow raise data.timeout_s={samples.config.timeout_s:g}"
            ) from error


def _tells_of_a_dead_worker(error: Exception, samples: SampleDataset) -> bool:
    if _DIED in str(error):
        return True
    # A micro batch in a dead worker's memory cannot be fetched any more, which raises other errors. An error of the
    # source in a worker contains "Caught".
    return samples.config.workers > 0 and not isinstance(error, RuntimeError) and "Caught " not in str(error)


def _as_it_is(read: MicroBatch | ConfigError) -> MicroBatch | ConfigError:
    return read
