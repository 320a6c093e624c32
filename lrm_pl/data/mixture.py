"""Weighted mixtures of data sets.

In each epoch, LRM uses Objaverse once and MVImgNet three times (section 4.1 of the paper). The shards of a data set of
weight w are therefore listed w times per epoch.
"""

import dataclasses
from collections.abc import Sequence

from lrm_pl.data.cache import CacheConfig
from lrm_pl.data.manifest import Manifest, Shard, ShardError, Split, require_measurable_views
from lrm_pl.data.source import ShardSource
from lrm_pl.errors import InputError


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A folder of shards in a mixture.

    Attributes:
        folder: Path or URL of the folder.
        weight: Number of times that each object in the folder appears in an epoch.
    """

    folder: str
    weight: int = 1

    def __post_init__(self) -> None:
        """Validate the weight."""
        if self.weight < 1:
            raise InputError("a weight of at least 1", self, "remove the data set if it is not used")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A shard in the list of shards of an epoch.

    Attributes:
        source: The folder of the shard.
        shard: The shard.
        repeat: Index of the repetition of the shard in the epoch, starting at 0.
    """

    source: ShardSource
    shard: Shard
    repeat: int


class Mixture:
    """A weighted mixture of data sets.

    Args:
        sets: The data sets.
        cache: Settings for reading shards from URLs.

    Attributes:
        members: Source, manifest and weight of each data set.

    Raises:
        InputError: A data set is missing, unfinished or damaged, or two data sets contain the same shard.
    """

    def __init__(self, sets: Sequence[DataSet], cache: CacheConfig = CacheConfig()) -> None:  # noqa: B008 - frozen
        sources = [ShardSource(one.folder, cache) for one in sets]
        self.members: tuple[tuple[ShardSource, Manifest, int], ...] = tuple(
            (source, source.manifest(), one.weight) for source, one in zip(sources, sets, strict=True)
        )
        self.ahead = cache.ahead
        holders = dict[str, ShardSource]()
        for source, manifest, _ in self.members:
            for shard in manifest.shards:
                other = holders.setdefault(shard.sha256, source)
                if other is not source and shard.samples:
                    raise InputError(
                        expected="data sets of different objects",
                        found=f"{shard.name} in both {other.location} and {source.location}",
                        remedy="list each data set once, with its weight",
                    )

    @property
    def name(self) -> str:
        """Paths or URLs of the data sets for error messages."""
        return " + ".join(source.location for source, _, _ in self.members)

    @property
    def views(self) -> int:
        """Minimum number of views per object over all data sets."""
        return min(manifest.views for _, manifest, _ in self.members)

    def entries(self, split: Split, *, repeated: bool) -> tuple[Entry, ...]:
        """Return the shards of a split.

        Args:
            split: The split.
            repeated: Whether shards are repeated according to the weights of the data sets, as in training.
        """
        return tuple(
            Entry(source, shard, repeat)
            for source, manifest, weight in self.members
            for repeat in range(weight if repeated else 1)
            for shard in manifest.split(split)
        )

    def require_usable(self, bounds: str) -> None:
        """Check that views are large enough for LPIPS and that objects are inside the bounds of the renderer.

        Args:
            bounds: Bounds of the renderer, "sphere" or "box".

        Raises:
            InputError: The views of a data set are too small, or objects exceed the bounds.
        """
        for source, manifest, _ in self.members:
            require_measurable_views(manifest, source.location)
            if manifest.render.get("normalize") == "cube" and bounds == "sphere":
                raise InputError(
                    subject=source.location,
                    expected="shards normalized to the unit sphere for the renderer bounds 'sphere'",
                    found="shards normalized to a cube, whose corners are outside the unit sphere",
                    remedy="use --model.renderer.bounds box",
                )

    def require_samples(self, least: int) -> None:
        """Check that the training split has enough samples for an optimizer step.

        Args:
            least: Number of samples per optimizer step.

        Raises:
            ShardError: The training split of a data set is empty, or there are too few samples.
        """
        for source, manifest, _ in self.members:
            if not manifest.split("train"):
                raise ShardError(
                    "samples in the split 'train'", "none", "render more objects", source.location
                )
        found = sum(entry.shard.samples for entry in self.entries("train", repeated=True))
        if found < least:
            raise ShardError(
                subject=self.name,
                expected=f"at least {least} samples in the split 'train' for one optimizer step",
                found=found,
                remedy=f"render more objects, or reduce the batch size with --data.batch_size {found}",
            )
