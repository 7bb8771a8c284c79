"""Load micro batches: one rank of each tensor-parallel group reads the samples and broadcasts them to its peers.

Shapes: B images of a micro batch, C channels, Y rows, X columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavit.data.config import DataConfig
from megavit.data.prefetch import LABELS, BadSample, MicroBatch, RequiredFields, SampleDataset, prefetch
from megavit.data.sampler import DeterministicSampler, SampleKey
from megavit.data.sources.base import Source, all_labels, dense_targets
from megavit.errors import ConfigError
from megavit.parallel.layout import ParallelLayout


@dataclass(frozen=True)
class Batch:
    """One micro batch, on the device, with the fields that this rank's stage needs.

    Attributes:
        images_BCYX: uint8; None if the stage needs no images.
        targets: the targets that the stage needs, by name. `labels` is int64 labels_B; with `data.multi_label` it is
            uint8 labels_BK, 1 for each of an image's labels. A dense target is target_BYX, in the source's type and in
            the images' size.
        counted_B: bool, False for the padding at the end of an evaluation.
        keys: keys of the samples, known on every rank.
        augmented: whether the batch is for training, so that the device erases and mixes its images.
    """

    images_BCYX: Tensor | None
    targets: Mapping[str, Tensor]
    counted_B: Tensor
    keys: list[SampleKey]
    augmented: bool = False

    def key_columns(self) -> tuple[Tensor, ...]:
        """Return the keys as int64 tensors on the CPU: sample_ids_B, epochs_B, occurrences_B."""
        return torch.tensor([(key.sample_id, key.epoch, key.occurrence) for key in self.keys]).unbind(dim=1)


class Loader:
    """Micro batches for this rank, in the global order, from any position.

    Args:
        source: the samples.
        config: the data group.
        layout: this rank's place; a data-parallel rank reads every dp-th micro batch.
        fields: fields that this rank's stage reads.
        micro_batch: images per micro batch.
        seed: `run.seed`.
        train: True for augmented samples in training order, False for each sample once in the source's order.
        indices: the samples to evaluate; None for all.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        layout: ParallelLayout,
        fields: RequiredFields,
        micro_batch: int,
        seed: int,
        train: bool,
        indices: Sequence[int] | None = None,
    ) -> None:
        assert indices is None or not train
        self.source, self.config, self.layout, self.fields = source, config, layout, fields
        self.micro_batch = micro_batch
        self.order = _training_order(source, config, seed=seed) if train else None
        self._evaluated = range(len(source)) if indices is None else indices
        self._samples = SampleDataset(source, config, fields, seed=seed, augment=train)
        self._bad: list[BadSample] = []
        self._reads = layout.tp_rank == 0 and (fields.images or bool(fields.targets))

    def train_batches(self, consumed_samples: int, *, num_steps: int, global_batch: int) -> Iterator[Batch]:
        """Yield this rank's micro batches of the next steps, across the ends of epochs.

        Micro batch k of a step has positions k·B to (k+1)·B of the step and belongs to data-parallel rank k mod dp.

        Args:
            consumed_samples: position to start from.
            num_steps: number of steps.
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
        """Yield this rank's part of the source once, padded to full micro batches; `counted_B` excludes the padding."""
        size, ids, device = self.micro_batch, self._evaluated, self.layout.device
        total = len(ids)

        def rows() -> Iterator[list[SampleKey]]:
            for index in range(self.num_evaluation_batches):
                first = (index * self.layout.dp + self.layout.dp_rank) * size
                # Padding repeats the last sample, with epoch −1 as its mark.
                places = range(first, first + size)
                yield [SampleKey(ids[i], 0) if i < total else SampleKey(ids[-1], -1) for i in places]

        yield from self._load(rows(), lambda row: torch.tensor([key.epoch == 0 for key in row], device=device))

    @property
    def num_evaluation_batches(self) -> int:
        """Return the number of micro batches per data-parallel rank that cover the source; the same on every rank.

        An interleaved pipeline needs a multiple of its number of ranks; the last micro batches may be padding only.
        """
        covering = -(-len(self._evaluated) // (self.micro_batch * self.layout.dp))
        group = self.layout.pp if self.layout.vpp > 1 else 1
        return -(-covering // group) * group

    def _load(self, rows: Iterator[list[SampleKey]], counted: Callable[[list[SampleKey]], Tensor]) -> Iterator[Batch]:
        if not self._reads:
            for row in rows:
                images, targets = self._share(None)
                yield Batch(images, targets, counted(row), row, self._samples.augment)
            return
        due: list[list[SampleKey]] = []

        def remember() -> Iterator[list[SampleKey]]:
            for row in rows:
                due.append(row)
                yield row

        on_gpu = self.layout.device.type == "cuda"
        reads = prefetch(self._samples, remember(), pins=on_gpu)
        for read in _copy_ahead(reads, self.layout.device) if on_gpu else reads:
            row = due.pop(0)
            self._bad += read.bad
            images, targets = self._share(read)
            yield Batch(images, targets, counted(row), row, self._samples.augment)

    def pop_bad_samples(self) -> list[BadSample]:
        """Return the samples that were replaced on this rank since the last call."""
        bad, self._bad = self._bad, []
        return bad

    def _share(self, read: MicroBatch | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Move a micro batch to the device, and broadcast it from tensor-parallel rank 0; its peers pass None."""
        images = None
        if self.fields.images:
            shape = (self.micro_batch, self.config.channels, *self.config.image_size)
            images = self._share_tensor(None if read is None else read.images, shape, torch.uint8)
        targets = {
            name: self._share_tensor(None if read is None else read.targets[name], *self._target_form(name))
            for name in self.fields.targets
        }
        return images, targets

    def _target_form(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the type of a target of a micro batch."""
        if name != LABELS:
            return (self.micro_batch, *self.config.image_size), dense_targets(self.source)[name]
        if self.config.multi_label:
            return (self.micro_batch, len(self.source.classes)), torch.uint8
        return (self.micro_batch,), torch.int64

    def _share_tensor(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        layout = self.layout
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype, device=layout.device)
        else:
            assert tensor.shape == shape, f"{tuple(tensor.shape)} is not {shape}"
            tensor = tensor.to(layout.device, non_blocking=True)
        if layout.tp > 1:
            group = layout.groups.tp
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
        return tensor


def _training_order(source: Source, config: DataConfig, *, seed: int) -> DeterministicSampler:
    if config.class_balanced and not source.classes:
        raise ConfigError(
            f"data.class_balanced=true needs classes, and data.source={config.source} has none; set it to false"
        )
    labels = all_labels(source) if config.class_balanced else None
    return DeterministicSampler(len(source), seed=seed, repeats=config.repeats, labels=labels)


def _copy_ahead(reads: Iterator[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Copy each micro batch to the GPU while the one before it is computed."""
    stream = torch.cuda.Stream(device)
    ahead: tuple[MicroBatch, torch.cuda.Event] | None = None
    for read in reads:
        with torch.cuda.stream(stream):
            copied = read.map(lambda tensor: tensor.to(device, non_blocking=True)), stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = copied
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(read: MicroBatch, copied: torch.cuda.Event) -> MicroBatch:
    computing = torch.cuda.current_stream()
    computing.wait_event(copied)
    for tensor in read.tensors:
        # The memory belongs to the copying stream, which must not reuse it before the computing stream is done with it.
        tensor.record_stream(computing)
    return read
