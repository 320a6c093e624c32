"""Several data sets as one: which shards an epoch holds, and how often.

LRM trains on Objaverse once and MVImgNet three times an epoch (section 4.1). A set of weight w stands w times among the
shards of an epoch, so all that follows (``lrm_pl.data.order``) knows one list of shards: the order stays a pure
function, and where a run is in its data stays one number.
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
        folder: The folder or its URL.
        weight: How often each of its objects comes in an epoch.
    """

    folder: str
    weight: int = 1

    def __post_init__(self) -> None:
        """Check the weight."""
        if self.weight < 1:
            raise InputError(expected="weights of 1 or more", found=self, remedy="leave a set out instead")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A shard among those of an epoch.

    Attributes:
        source: The set that it belongs to.
        shard: The shard.
        repeat: Which of its appearances in an epoch this is, from 0 on.
    """

    source: ShardSource
    shard: Shard
    repeat: int


class Mixture:
    """Data sets, opened.

    Args:
        sets: The sets.
        cache: How shards at URLs are read.

    Attributes:
        members: (source, manifest, weight) of each set.

    Raises:
        InputError: A set is missing, unfinished or damaged, or two hold the same shard.
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
                        expected="sets of different objects",
                        found=f"{shard.name} of {source.location} in {other.location} too",
                        remedy="name a set once, with its weight",
                    )

    @property
    def name(self) -> str:
        """What messages call it: the sets' folders."""
        return " + ".join(source.location for source, _, _ in self.members)

    @property
    def views(self) -> int:
        """Views of every object, at least."""
        return min(manifest.views for _, manifest, _ in self.members)

    def entries(self, split: Split, *, repeated: bool) -> tuple[Entry, ...]:
        """List the shards of a split.

        Args:
            split: Which.
            repeated: Each as often as its set's weight says, as in training; else once.
        """
        return tuple(
            Entry(source, shard, repeat)
            for source, manifest, weight in self.members
            for repeat in range(weight if repeated else 1)
            for shard in manifest.split(split)
        )

    def require_usable(self, bounds: str) -> None:
        """Reject views too small for LPIPS, and objects that extend beyond the bounds of the renderer.

        Args:
            bounds: ``bounds`` of the renderer.

        Raises:
            InputError: A set has such views or objects.
        """
        for source, manifest, _ in self.members:
            require_measurable_views(manifest, source.location)
            if manifest.render.get("normalize") == "cube" and bounds == "sphere":
                raise InputError(
                    subject=source.location,
                    expected="sphere-normalized shards for renderer bounds 'sphere'",
                    found="'cube': corners outside the unit sphere would be cut off",
                    remedy="use --model.renderer.bounds box",
                )

    def require_samples(self, least: int) -> None:
        """Refuse a training split with fewer samples than an optimizer step takes.

        Raises:
            ShardError: It is empty or too small.
        """
        for source, manifest, _ in self.members:
            if not manifest.split("train"):
                raise ShardError(
                    subject=source.location,
                    expected="samples in the split 'train'",
                    found="none",
                    remedy="render more objects",
                )
        found = sum(entry.shard.samples for entry in self.entries("train", repeated=True))
        if found < least:
            raise ShardError(
                subject=self.name,
                expected=f"at least {least} samples in the split 'train', one optimizer step's",
                found=found,
                remedy=f"render more objects, or take a smaller batch: --data.batch_size {found}",
            )
