"""Datasets over shards: the endless training stream, and evaluation sets with every sample once."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from lrm_pl.data.batch import Item, PackedBatch, collate
from lrm_pl.data.manifest import Split
from lrm_pl.data.mixture import Mixture
from lrm_pl.data.order import SampleLocation, SampleOrder, ShardReader
from lrm_pl.data.schema import SampleError
from lrm_pl.data.transforms import Augmentation, choose_views, evaluation_item, sample_rng, training_item
from lrm_pl.errors import InputError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BatchPartition:
    """Which part of every global batch a process makes.

    The batch of an optimizer step is G positions of the global sequence. It is cut into ``accumulate`` runs of equal
    length, one after the other, and rank r of ``world`` takes every world-th position of a run, from r on: so the
    samples of a step are the same whatever the world and the accumulation.

    Attributes:
        batch_size: G, objects an optimizer step, over all ranks and accumulated batches.
        rank: Number of this process.
        world: Number of processes.
        accumulate: Batches an optimizer step.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        """Check that the batch can be shared out.

        Raises:
            InputError: With the numbers to choose from.
        """
        if self.accumulate < 1:
            raise InputError(expected="trainer.accumulate_grad_batches of at least 1", found=self.accumulate)
        parts = self.world * self.accumulate
        if self.batch_size < 1 or self.batch_size % parts:
            below, above = self.batch_size // parts * parts, -(-max(1, self.batch_size) // parts) * parts
            raise InputError(
                expected=(
                    f"a data.batch_size that {self.world} processes x {self.accumulate} accumulated batches "
                    "divide"
                ),
                found=self.batch_size,
                remedy=(
                    "it counts the objects of an optimizer step over all of them: take "
                    f"{(f'{below} or ' if below else '')}{above}, or another number of processes"
                ),
            )

    @property
    def local_batch_size(self) -> int:
        """Objects that one process decodes at a time."""
        return self.batch_size // (self.world * self.accumulate)

    def positions(self, start: int, batch: int) -> range:
        """Return the global positions of this process's batch number ``batch``, counted from ``start``."""
        run = self.batch_size // self.accumulate
        first = start + batch * run
        return range(first + self.rank, first + run, self.world)


class TrainingStream(IterableDataset[PackedBatch]):
    """This process's share of the global sequence (``lrm_pl.data.order``), from position ``position`` on.

    Worker k of K makes the whole batches k, k + K, ... counted from there, so the order does not depend on K.

    Args:
        mixture: The data sets.
        share: Which samples are this process's.
        inputs: Input views an object; they are targets too.
        side_views: Views an object that are targets only.
        unseen_views: The last views of every object, never trained on.
        input_pool: The first input view is one of the first so many; None means any training view.
        augmentation: What else is random.
        seed: Seed of order and augmentation.
        streams: S of the global sequence.
        steps: How many optimizer steps to feed.
        step: Optimizer steps done before.
        position: First global position g.
        counted: Optimizer steps before these whose batches the length counts, as Lightning does where it resumes.

    Raises:
        InputError: The split has no samples, or fewer than an optimizer step takes.
    """

    def __init__(
        self,
        mixture: Mixture,
        share: BatchPartition,
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
    ) -> None:
        mixture.require_samples(share.batch_size)
        entries = mixture.entries("train", repeated=True)
        # A batch takes its samples from all streams, each of which is in a shard of its own, or between two.
        self.reader, self.ahead = ShardReader(entries, kept=2 * streams), mixture.ahead
        self.order = SampleOrder(tuple(entry.shard.samples for entry in entries), seed, streams)
        self.share, self.inputs, self.side_views, self.unseen_views = share, inputs, side_views, unseen_views
        self.input_pool, self.augmentation, self.seed = input_pool, augmentation, seed
        self.steps, self.step, self.position, self.counted = steps, step, position, counted

    def __len__(self) -> int:
        """Return the number of batches; the same on every rank."""
        return (self.counted + self.steps) * self.share.accumulate

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield collated batches."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        batches = range(worker, self.steps * self.share.accumulate, workers)
        ahead = self._announced(batches)
        for batch in batches:
            next(ahead, None)
            yield collate([self.item(g) for g in self.share.positions(self.position, batch)])

    def _announced(self, batches: range) -> Iterator[None]:
        """Announce shards some samples ahead: all of them at first, then a batch's at a time."""
        first = -(-self.ahead // self.share.local_batch_size)
        for number, batch in enumerate(batches):
            for g in self.share.positions(self.position, batch):
                self.reader.prefetch(self.order.locate(g).shard)
            if number >= first:
                yield

    def item(self, position: int) -> Item:
        """Make the item at global position g; bad samples are replaced, and named among its faults."""
        step = self.step + (position - self.position) // self.share.batch_size
        faults: list[str] = []
        item = self.order.fill(position, lambda place: self._make(place, step), faults.append)
        return dataclasses.replace(item, faults=(tuple(faults),))

    def _make(self, place: SampleLocation, step: int) -> Item:
        views, rng = self._chosen(place)
        sample = self.reader.read(place, views)
        try:
            return training_item(sample, views, self.inputs, self.augmentation, step, rng)
        except SampleError as error:  # a view that is no image
            if self.reader.evict_if_corrupt(place):
                return self._make(place, step)
            raise self.reader.located(place, error) from error

    def _chosen(self, place: SampleLocation) -> tuple[list[int], Any]:
        """Draw the views of the sample at a place; deterministic, so it may be asked twice."""
        key = self.reader.keys(place.shard)[place.index]
        rng = sample_rng(self.seed, place.epoch, key, self.reader.entries[place.shard].repeat)
        available = self.reader.view_count(place) - self.unseen_views
        return choose_views(rng, available, self.inputs + self.side_views, self.input_pool), rng


class EvaluationSet(IterableDataset[Item]):
    """Every sample of a split once, without randomness: first views in, some views out, whole and over white.

    Rank r of W takes every W-th sample from r on. All ranks make the same number of items, as sharded networks need:
    where the split does not divide, and in the place of a bad sample (which is said), stands another one of weight 0.
    Worker k of K makes the items k, k + K, ...

    Args:
        mixture: The data sets; each object comes once, whatever the weights.
        split: Which split.
        inputs: Number of input views.
        views: Which of an object's views are targets, as a slice of them all.
        limit: Most objects; where the split has more, that many, evenly spread. None means all.
        rank: Number of this process.
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
        places = [
            SampleLocation(0, i, k) for i, entry in enumerate(entries) for k in range(entry.shard.samples)
        ]
        count = len(places) if limit is None else min(limit, len(places))
        self.places = [places[i * len(places) // count] for i in range(count)]
        self.inputs, self.views, self.rank, self.world = inputs, views, rank, world

    def __len__(self) -> int:
        """Return the number of items of every rank, those of weight 0 included."""
        return -(-len(self.places) // self.world)

    def __iter__(self) -> Iterator[Item]:
        """Yield an item an object; one that cannot be read is replaced by an item of weight 0.

        Raises:
            InputError: Not one sample can be read. Other ranks may read theirs, and would wait for this one.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        stand_in: Item | None = None
        for number in range(worker, len(self), workers):
            index = number * self.world + self.rank
            item = self._try(index) if index < len(self.places) else None
            if item is None:
                item = stand_in = stand_in or self._stand_in()
            if item is None:
                raise InputError(
                    expected="a sample of the split that can be read",
                    found=f"none among {len(self.places)}",
                    remedy=(
                        "the warnings above name them; check them with `python -m data_tools validate --shards "
                        "FOLDER`"
                    ),
                )
            yield item

    def readable(self) -> Iterator[Item]:
        """Yield the items of all that can be read, in this process, without a word of the rest."""
        items = (self._try(index, say=False) for index in range(len(self.places)))
        return (item for item in items if item is not None)

    def _try(self, index: int, *, say: bool = True) -> Item | None:
        place = self.places[index]
        try:
            views = range(self.reader.view_count(place))[self.views]
            sample = self.reader.read(place, sorted({*range(self.inputs), *views}))
            try:
                return evaluation_item(sample, self.inputs, views)
            except SampleError as error:  # a view that is no image
                if self.reader.evict_if_corrupt(place):
                    return self._try(index, say=say)
                raise self.reader.located(place, error) from error
        except SampleError as error:
            if say:
                logger.warning("skipped %s", error)
            return None

    def _stand_in(self) -> Item | None:
        """Make the first readable sample an item of weight 0."""
        item = next(self.readable(), None)
        return None if item is None else dataclasses.replace(item, weight=torch.zeros(()))
