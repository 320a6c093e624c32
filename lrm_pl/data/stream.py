"""Datasets that read shards for training (a webdataset pipeline) or for evaluation (each sample once)."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from lrm_pl.data.batch import Item, PackedBatch, collate
from lrm_pl.data.manifest import Split
from lrm_pl.data.mixture import Mixture
from lrm_pl.data.order import SampleLocation, SampleOrder
from lrm_pl.data.reader import ShardReader
from lrm_pl.data.schema import SampleError, decode_sample
from lrm_pl.data.transforms import (
    Augmentation,
    DecodedSample,
    choose_views,
    decode_views,
    evaluation_item,
    sample_rng,
    training_item,
)
from lrm_pl.errors import InputError, counted

logger = logging.getLogger(__name__)

#: A stage of the training pipeline between decoding and augmentation.
SampleStage = Callable[[DecodedSample], DecodedSample]


@dataclasses.dataclass(frozen=True)
class BatchPartition:
    """The positions of each global batch that one process reads.

    The batch of an optimizer step consists of ``batch_size`` positions of the global order. It is divided into
    ``accumulate`` contiguous parts of equal length. In each part, rank r reads every ``world``-th position, starting at
    position r. The samples of a step therefore do not depend on ``world`` or ``accumulate``.

    Attributes:
        batch_size: Number of objects per optimizer step, including all ranks and accumulated batches.
        rank: Rank of this process.
        world: Number of processes.
        accumulate: Number of batches per optimizer step.

    Raises:
        InputError: ``batch_size`` is not divisible by ``world`` times ``accumulate``.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        """Validate the ranges of the fields."""
        if self.accumulate < 1:
            raise InputError(expected="trainer.accumulate_grad_batches of at least 1", found=self.accumulate)
        parts = self.world * self.accumulate
        if self.batch_size < 1 or self.batch_size % parts:
            below = self.batch_size // parts * parts
            choices = " or ".join(str(size) for size in (below, below + parts) if size > 0)
            raise InputError(
                subject="data.batch_size",
                expected=f"a number divisible by {self.world} processes times {self.accumulate} accumulated batches",
                found=self.batch_size,
                remedy=f"use {choices} objects per optimizer step, or another number of processes",
            )

    @property
    def local_batch_size(self) -> int:
        """Number of objects per batch of this process."""
        return self.batch_size // (self.world * self.accumulate)

    def positions(self, start: int, batch: int) -> range:
        """Return the global positions of a batch of this process.

        Args:
            start: Global position of the first batch.
            batch: Index of the batch.
        """
        part = self.batch_size // self.accumulate
        first = start + batch * part
        return range(first + self.rank, first + part, self.world)


class TrainingStream(webdataset.DataPipeline):  # type: ignore[misc]
    """The training batches of this process, starting at a global position (``lrm_pl.data.order``).

    The stages are ``locations``, ``read``, ``decode``, the elements of ``stages``, ``augment`` and ``batches``. Worker
    k of K creates batches k, k + K, ..., so the order does not depend on K. For a bad sample, ``locations`` yields
    replacements until one passes all stages.

    Args:
        mixture: The data sets.
        partition: The positions that this process reads.
        inputs: Number of input views per object, which are also target views.
        side_views: Number of additional target views per object.
        unseen_views: Number of trailing views of each object that are not used in training.
        input_pool: Number of leading views of each object from which the first input view is drawn. If None, it is
            drawn from all training views.
        augmentation: Settings for random crops and camera noise.
        seed: Seed for the order of samples and for augmentation.
        streams: Number of streams of the global order.
        steps: Number of optimizer steps.
        step: Number of optimizer steps completed before the first batch.
        position: Global position of the first sample.
        counted: Number of earlier optimizer steps to include in ``len()``, as Lightning requires for a resumed run.
        stages: Functions from ``DecodedSample`` to ``DecodedSample``, which are applied in order before augmentation. A
            function rejects a sample by raising ``SampleError`` or returning None.

    Raises:
        InputError: The training split has fewer samples than an optimizer step requires.
    """

    def __init__(
        self,
        mixture: Mixture,
        partition: BatchPartition,
        inputs: int,
        side_views: int,
        unseen_views: int,
        input_pool: int | None,
        augmentation: Augmentation,
        seed: int,
        streams: int,
        steps: int,
        step: int = 0,
        position: int = 0,
        *,
        counted: int = 0,
        stages: Sequence[SampleStage] = (),
    ) -> None:
        mixture.require_samples(partition.batch_size)
        entries = mixture.entries("train", repeated=True)
        # Each stream reads from one shard, or from two at a boundary.
        self.reader, self.ahead = ShardReader(entries, kept=2 * streams), mixture.ahead
        self.order = SampleOrder(tuple(entry.shard.samples for entry in entries), seed, streams)
        self.partition, self.inputs, self.side_views = partition, inputs, side_views
        self.unseen_views, self.input_pool = unseen_views, input_pool
        self.augmentation, self.seed = augmentation, seed
        self.steps, self.step, self.position, self.counted = steps, step, position, counted
        # The pipeline processes one sample at a time. These attributes are the errors of the bad samples at its
        # position, the error of the latest candidate, and whether the latest candidate has passed all stages.
        self._faults: list[str] = []
        self._error: Exception | None = None
        self._has_passed = False
        maps = (self.read, self.decode, *stages, self.augment)
        super().__init__(
            self.locations, *(webdataset.map(stage, handler=self.skip) for stage in maps), self.batches
        )

    def __len__(self) -> int:
        """Return the number of batches, which is equal on all ranks."""
        return (self.counted + self.steps) * self.partition.accumulate

    def locations(self) -> Iterator[tuple[SampleLocation, int]]:
        """Yield the location and the optimizer step of each sample of this worker, including replacements."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        batches = range(worker, self.steps * self.partition.accumulate, workers)
        prefetched = self._prefetch(batches)
        for batch in batches:
            next(prefetched, None)
            for g in self.partition.positions(self.position, batch):
                yield from self._candidates(g)

    def _candidates(self, position: int) -> Iterator[tuple[SampleLocation, int]]:
        """Yield candidate samples for a global position until one passes all stages.

        Raises:
            SampleError: No sample passes all stages.
        """
        self._faults, step = [], self.step + (position - self.position) // self.partition.batch_size
        for location in self.order.candidates(position):
            is_damaged_copy = True
            while is_damaged_copy:
                self._error, self._has_passed = None, False
                yield location, step
                if self._has_passed:
                    return
                is_damaged_copy = self.reader.evict_if_corrupt(location)
            self._faults.append(self._fault(location))
        raise SampleError(
            expected="a readable sample",
            found=f"none among {counted(self.order.total, 'sample')}",
            remedy=f"the last error was: {self._faults[-1]}",
        )

    def _fault(self, location: SampleLocation) -> str:
        """Return the error message of the latest candidate, which is a bad sample."""
        error = self._error or SampleError("The sample was rejected by a function in data.stages")
        try:
            return str(self.reader.located(location, error))
        except SampleError as unreadable:  # the index of the shard cannot be read
            return str(unreadable)

    def _prefetch(self, batches: range) -> Iterator[None]:
        """Prefetch the shards of the next ``ahead`` samples, and of one additional batch per iteration."""
        first = -(-self.ahead // self.partition.local_batch_size)
        for number, batch in enumerate(batches):
            for g in self.partition.positions(self.position, batch):
                self.reader.prefetch(self.order.locate(g).shard)
            if number >= first:
                yield

    def read(self, source: tuple[SampleLocation, int]) -> dict[str, Any]:
        """Select views of a sample and read the tar members."""
        location, step = source
        entry = self.reader.entries[location.shard]
        rng = sample_rng(self.seed, location.epoch, self.reader.key(location), entry.repeat)
        available = self.reader.view_count(location) - self.unseen_views
        views = choose_views(rng, available, self.inputs + self.side_views, self.input_pool)
        selection = {"__views__": views, "__step__": step, "__rng__": rng}
        return self.reader.read_members(location, views) | selection

    def decode(self, members: dict[str, Any]) -> DecodedSample:
        """Validate the members and decode the selected views."""
        sample = decode_sample(members["__key__"], members, members["__views__"])
        return decode_views(sample, members["__views__"], members["__step__"], members["__rng__"])

    def augment(self, sample: DecodedSample) -> Item:
        """Create a training item with random crops and backgrounds."""
        item = training_item(sample, self.inputs, self.augmentation)
        self._has_passed = True
        return dataclasses.replace(item, faults=(tuple(self._faults),))

    def batches(self, items: Iterable[Item]) -> Iterator[PackedBatch]:
        """Collate items into batches."""
        # Unlike ``webdataset.batched``, this yields a batch before it requests the first item of the next batch.
        remaining = iter(items)
        while batch := list(islice(remaining, self.partition.local_batch_size)):
            yield collate(batch)

    def skip(self, error: Exception) -> bool:
        """Record the error of a bad sample and raise other errors. This is the error handler of all stages."""
        if not isinstance(error, SampleError):
            raise error
        self._error = error
        return True


class EvaluationSet(IterableDataset[Item]):
    """The samples of a split for evaluation, each of which appears once, with views at full size.

    Rank r of W reads every W-th sample, starting at sample r, and worker k of K creates items k, k + K, ... of the
    rank. All ranks create the same number of items, as sharded networks require. Bad samples, and missing samples at
    the end, are therefore replaced with a valid sample of weight 0.

    Args:
        mixture: The data sets. Each object is included once, regardless of the weights.
        split: The split.
        inputs: Number of input views, which are the first views of an object.
        views: Slice that selects the target views from all views of an object.
        limit: Maximum number of objects, which are evenly distributed over the split. If None, all objects are
            used.
        rank: Rank of this process.
        world: Number of processes.
    """

    def __init__(
        self,
        mixture: Mixture,
        split: Split,
        inputs: int,
        views: slice,
        limit: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        entries = mixture.entries(split, repeated=False)
        self.reader = ShardReader(entries)
        locations = [
            SampleLocation(0, i, k) for i, entry in enumerate(entries) for k in range(entry.shard.samples)
        ]
        count = len(locations) if limit is None else min(limit, len(locations))
        self.locations = [locations[i * len(locations) // count] for i in range(count)]
        self.inputs, self.views, self.rank, self.world = inputs, views, rank, world

    def __len__(self) -> int:
        """Return the number of items per rank, including items of weight 0."""
        return -(-len(self.locations) // self.world)

    def __iter__(self) -> Iterator[Item]:
        """Yield one item per object. A sample that cannot be read is replaced with an item of weight 0.

        Raises:
            InputError: No sample can be read.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        replacement: Item | None = None
        for number in range(worker, len(self), workers):
            index = number * self.world + self.rank
            item = self._try(index) if index < len(self.locations) else None
            if item is None:
                item = replacement = replacement or self._replacement()
            yield item

    def readable(self) -> Iterator[Item]:
        """Yield the items of all readable samples, without warnings about unreadable samples."""
        items = (self._try(index, warn=False) for index in range(len(self.locations)))
        return (item for item in items if item is not None)

    def _try(self, index: int, *, warn: bool = True) -> Item | None:
        location = self.locations[index]
        try:
            views = range(self.reader.view_count(location))[self.views]
            return self.reader.read_as(
                location,
                sorted({*range(self.inputs), *views}),
                lambda sample: evaluation_item(sample, self.inputs, views),
            )
        except SampleError as error:
            if warn:
                logger.warning("skipped %s", error)
            return None

    def _replacement(self) -> Item:
        """Return the first readable sample as an item of weight 0."""
        for item in self.readable():
            return dataclasses.replace(item, weight=torch.zeros(()))
        raise InputError(
            expected="a readable sample in the split",
            found=f"none among {counted(len(self.locations), 'sample')}",
            remedy="check the shards with `python -m data_tools validate --shards FOLDER`",
        )
