"""Datasets over shards: the endless training stream, and evaluation sets with every sample once."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from lrm_pl.data.batch import Batch, collate
from lrm_pl.data.manifest import Manifest, Split
from lrm_pl.data.schema import SampleError
from lrm_pl.data.shards import Order, Place, ShardReader, require_samples
from lrm_pl.data.transforms import CropConfig, choose_views, evaluation_item, sample_rng, training_item

logger = logging.getLogger(__name__)


class TrainingStream(IterableDataset[Batch]):
    """Batches of the global sequence (``lrm_pl.data.shards``), from position ``position`` on.

    Worker k of K makes the whole batches k, k + K, ... counted from there, so the order does not depend on K.

    Args:
        folder: Folder of the shards.
        manifest: Its manifest.
        batch_size: G, objects a batch.
        views: Views an object: the input view and the side views.
        unseen_views: The last views of every object, never trained on.
        input_views: The input view is one of the first so many; None means any training view.
        crop: Sizes of the target windows.
        seed: Seed of order and augmentation.
        streams: S of the global sequence.
        batches: How many batches to make.
        position: First global position g.
        done: Batches that the run has had before ``position``. They count in ``len`` only: Lightning compares it
            with the number of batches of the whole run.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        batch_size: int,
        views: int,
        unseen_views: int,
        input_views: int | None,
        crop: CropConfig,
        seed: int,
        streams: int,
        batches: int,
        position: int = 0,
        done: int = 0,
    ) -> None:
        shards = manifest.split("train")
        require_samples(folder, shards, "train")
        self.reader = ShardReader(folder, shards)
        self.order = Order(tuple(shard.samples for shard in shards), seed, streams)
        self.batch_size, self.views, self.unseen_views = batch_size, views, unseen_views
        self.input_views = input_views
        self.crop, self.seed, self.batches, self.position, self.done = crop, seed, batches, position, done

    def __len__(self) -> int:
        """Return the number of batches of a whole run."""
        return self.done + self.batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield collated batches."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for batch in range(worker, self.batches, workers):
            start = self.position + batch * self.batch_size
            yield collate([self.item(g) for g in range(start, start + self.batch_size)])

    def item(self, position: int) -> Batch:
        """Make the item at global position g; bad samples are replaced, and said so."""
        return self.order.fill(position, self._make, lambda message: logger.warning("skipped %s", message))

    def _make(self, place: Place) -> Batch:
        views, rng = self._chosen(place)
        sample = self.reader.read(place, views)
        try:
            return training_item(sample, views, self.crop, rng)
        except SampleError as error:  # a view that is no picture
            raise self.reader.located(place, error) from error

    def _chosen(self, place: Place) -> tuple[list[int], Any]:
        """Draw the views of the sample at a place; deterministic, so it may be asked twice."""
        key = self.reader.keys(place.shard)[place.index]
        rng = sample_rng(self.seed, place.epoch, key)
        available = self.reader.view_count(place) - self.unseen_views
        return choose_views(rng, available, self.views, self.input_views), rng


class EvaluationSet(IterableDataset[Batch]):
    """Every sample of a split once, without randomness: view 0 in, some views out, whole and over white.

    A bad sample is left out, and said so. Worker k of K makes the items k, k + K, ...

    Args:
        folder: Folder of the shards.
        manifest: Its manifest.
        split: Which split.
        views: Numbers of the target views.
        limit: Most objects; where the split has more, that many, evenly spread. None means all.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, split: Split, views: Sequence[int], limit: int | None = None
    ) -> None:
        shards = manifest.split(split)
        self.reader = ShardReader(folder, shards)
        places = [Place(0, i, k) for i, shard in enumerate(shards) for k in range(shard.samples)]
        count = len(places) if limit is None else min(limit, len(places))
        self.places = [places[i * len(places) // count] for i in range(count)]
        self.views = tuple(views)

    def __len__(self) -> int:
        """Return the number of objects, bad ones included."""
        return len(self.places)

    def __iter__(self) -> Iterator[Batch]:
        """Yield an item an object."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for place in self.places[worker::workers]:
            try:
                item = self._make(place)
            except SampleError as error:
                logger.warning("skipped %s", error)
            else:
                yield item

    def _make(self, place: Place) -> Batch:
        sample = self.reader.read(place, sorted({0, *self.views}))
        try:
            return evaluation_item(sample, 0, self.views)
        except SampleError as error:  # a view that is no picture
            raise self.reader.located(place, error) from error
