"""The loader: every rank knows which samples are due, one rank of each tensor-parallel group reads them.

Shapes: B images of a micro batch, C channels, Y rows, X columns.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from megavit.data.config import DataConfig
from megavit.data.decode import Jpeg
from megavit.data.order import SampleKey, SampleOrder
from megavit.data.source import Source, open_sample
from megavit.data.transforms import draw_shifts, shift_image
from megavit.data.views import View
from megavit.errors import ConfigError
from megavit.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Batch:
    """One micro batch, on the device; a field is None on the ranks whose stage does not need it.

    Attributes:
        images_BCYX: uint8.
        labels_B: int64.
        counted_B: bool, False for the padding at the end of an evaluation.
        keys: which samples these are, known on every rank.
    """

    images_BCYX: Tensor | None
    labels_B: Tensor | None
    counted_B: Tensor
    keys: list[SampleKey]

    def key_columns(self) -> tuple[Tensor, ...]:
        """The keys as int64 tensors on the CPU: sample_ids_B, epochs_B, occurrences_B."""
        return torch.tensor([(key.sample_id, key.epoch, key.occurrence) for key in self.keys]).unbind(dim=1)


@dataclass(frozen=True)
class Needs:
    """What this rank's pipeline stage reads of a batch."""

    images: bool
    labels: bool


class _Samples(Dataset[tuple[Tensor, int]]):
    """Keys to augmented images and labels, here or in a worker process."""

    def __init__(self, source: Source, config: DataConfig, needs: Needs, *, seed: int, augment: bool) -> None:
        self.source, self.config, self.needs, self.seed, self.augment = source, config, needs, seed, augment
        self.view = View(config, augment=augment)

    def __getitems__(self, keys: list[SampleKey]) -> list[tuple[Tensor, int]] | ConfigError:
        """Read a micro batch, called by DataLoader.

        A user's error comes back as a value: raised in a worker, DataLoader would bury its message in a traceback.
        """
        try:
            return self._read(keys)
        except ConfigError as error:
            return error

    def _read(self, keys: list[SampleKey]) -> list[tuple[Tensor, int]]:
        # Draws are made for all of the micro batch at once.
        labels = [self.source.label(key.sample_id) if self.needs.labels else -1 for key in keys]
        if not self.needs.images:
            return [(torch.empty(0, dtype=torch.uint8), label) for label in labels]
        images = self.view(self._natural(keys), keys, seed=self.seed)
        if self.augment and self.config.shift:
            shifts = draw_shifts(keys, pixels=self.config.shift, seed=self.seed)
            images = [shift_image(image, *shift) for image, shift in zip(images, shifts, strict=True)]
        return list(zip(images, labels, strict=True))

    def _natural(self, keys: list[SampleKey]) -> Iterator[Tensor | Jpeg]:
        # One by one: a micro batch of photographs as they were taken can be larger than the memory.
        for key in keys:
            image = open_sample(self.source, key.sample_id)
            if isinstance(image, Tensor) and (
                image.ndim != 3 or image.shape[0] != self.config.channels or image.dtype != torch.uint8
            ):
                raise ConfigError(
                    f"sample {key.sample_id} of data.source={self.config.source} is {image.dtype} {list(image.shape)}, "
                    f"and uint8 [{self.config.channels}, rows, columns] is due (data.channels={self.config.channels})"
                )
            yield image


def _collate(samples: list[tuple[Tensor, int]] | ConfigError) -> tuple[Tensor, Tensor] | ConfigError:
    return samples if isinstance(samples, ConfigError) else default_collate(samples)


class Loader:
    """Micro batches for this rank, in the global order, from any position.

    Args:
        source: the samples.
        config: the data group.
        layout: this rank's place; a data-parallel rank takes every dp-th micro batch.
        needs: what this rank's stage reads.
        micro_batch: images per micro batch.
        seed: `run.seed`.
        train: in the order of training and augmented, or once in the source's own order.
        only: without training, these samples alone.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        layout: ParallelLayout,
        needs: Needs,
        micro_batch: int,
        seed: int,
        train: bool,
        only: Sequence[int] | None = None,
    ) -> None:
        assert only is None or not train
        self.source, self.config, self.layout, self.needs = source, config, layout, needs
        self.micro_batch = micro_batch
        self.order = SampleOrder(len(source), seed=seed) if train else None
        self._evaluated = range(len(source)) if only is None else only
        self._samples = _Samples(source, config, needs, seed=seed, augment=train)
        self._reads = layout.tp_rank == 0 and (needs.images or needs.labels)

    def train_batches(self, consumed_samples: int, *, num_steps: int, global_batch: int) -> Iterator[Batch]:
        """This rank's micro batches of the next steps, without an end of epoch.

        Micro batch k of a step holds positions k·B to (k+1)·B of the step and belongs to data-parallel rank k mod dp.

        Args:
            consumed_samples: position to start from.
            num_steps: steps to yield.
            global_batch: images per step over all ranks.
        """
        assert self.order is not None
        order, size, layout = self.order, self.micro_batch, self.layout

        def rows() -> Iterator[list[SampleKey]]:
            for step in range(num_steps):
                start = consumed_samples + step * global_batch
                for first in range(start + layout.dp_rank * size, start + global_batch, layout.dp * size):
                    yield [order.at(position) for position in range(first, first + size)]

        everything = torch.ones(size, dtype=torch.bool, device=layout.device)
        yield from self._load(rows(), lambda row: everything)

    def evaluation_batches(self) -> Iterator[Batch]:
        """This rank's share of the whole source, once: padded to whole micro batches, the padding not counted."""
        size, ids, device = self.micro_batch, self._evaluated, self.layout.device
        total = len(ids)

        def rows() -> Iterator[list[SampleKey]]:
            for index in range(self.num_evaluation_batches):
                first = (index * self.layout.dp + self.layout.dp_rank) * size
                # Padding repeats the last sample; its epoch −1 marks it.
                places = range(first, first + size)
                yield [SampleKey(ids[i], 0) if i < total else SampleKey(ids[-1], -1) for i in places]

        yield from self._load(rows(), lambda row: torch.tensor([key.epoch == 0 for key in row], device=device))

    @property
    def num_evaluation_batches(self) -> int:
        """Micro batches per data-parallel rank that cover the source; the same on every rank.

        An interleaved pipeline takes them in multiples of its ranks; the last may be padding alone.
        """
        covering = -(-len(self._evaluated) // (self.micro_batch * self.layout.dp))
        group = self.layout.pp if self.layout.vpp > 1 else 1
        return -(-covering // group) * group

    def _load(self, rows: Iterator[list[SampleKey]], counted: Callable[[list[SampleKey]], Tensor]) -> Iterator[Batch]:
        if not self._reads:
            for row in rows:
                images, labels = self._share(None, None)
                yield Batch(images, labels, counted(row), row)
            return
        due: list[list[SampleKey]] = []

        def remember() -> Iterator[list[SampleKey]]:
            for row in rows:
                due.append(row)
                yield row

        loader = DataLoader(
            self._samples,
            batch_sampler=remember(),  # type: ignore[arg-type]
            num_workers=self.config.workers,
            pin_memory=self.layout.device.type == "cuda",
            # DataLoader draws a seed for its workers when it starts; from the default generator that would move the
            # dropout of the step in which it happens to start, and a resumed run would not be bit-equal.
            generator=torch.Generator(),
            collate_fn=_collate,
        )
        for read in loader:
            if isinstance(read, ConfigError):
                raise read
            row = due.pop(0)
            images, labels = self._share(*read)
            yield Batch(images, labels, counted(row), row)

    def _share(self, images: Tensor | None, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Move a micro batch to the device and, from tensor-parallel rank 0, to its peers."""
        layout, shape = self.layout, (self.micro_batch, self.config.channels, *self.config.image_size)
        shared: list[Tensor | None] = []
        for needed, tensor, size, dtype in (
            (self.needs.images, images, shape, torch.uint8),
            (self.needs.labels, labels, (self.micro_batch,), torch.int64),
        ):
            if not needed:
                shared.append(None)
                continue
            if tensor is None:
                tensor = torch.empty(size, dtype=dtype, device=layout.device)
            else:
                assert tensor.shape == size, f"{tuple(tensor.shape)} is not {size}"
                tensor = tensor.to(layout.device, non_blocking=True)
            if layout.tp > 1:
                group = layout.groups.tp
                dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
            shared.append(tensor)
        return shared[0], shared[1]
