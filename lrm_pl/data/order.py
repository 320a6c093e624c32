"""The one global sequence of samples: (seed, position) -> sample, as pure functions; and reading a sample by offset.

Epoch e is the split's shards (those of a set of weight w stand there w times), permuted by (seed, e) and concatenated
to N samples, cut into S streams of equal length +-1. Position p of the epoch is in stream p mod S, at index p // S. A
run is the endless sequence g = e N + p: a batch takes the next G of it, so batches straddle epochs and nothing is
dropped or padded. Where a run is in its data is the one number g. Nothing is buffered: members are read by their
offsets.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import TypeVar

import numpy as np

from lrm_pl.data.manifest import MemberIndex, ShardError
from lrm_pl.data.mixture import Entry
from lrm_pl.data.schema import (
    IMAGE_FORMATS,
    NEEDED_MEMBERS,
    VIEW_PATTERN,
    Sample,
    SampleError,
    decode_sample,
    view_member,
)
from lrm_pl.storage import StoreError

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class SampleLocation:
    """Where a sample is: epoch, shard number, index inside that shard."""

    epoch: int
    shard: int
    index: int


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """The global sequence, a pure function of its fields.

    Attributes:
        counts: Samples a shard.
        seed: Seed of the permutations.
        streams: S, the number of streams that an epoch is cut into: neighbors in the sequence come from
            different streams, so from different shards.
    """

    counts: tuple[int, ...]
    seed: int
    streams: int

    @cached_property
    def total(self) -> int:
        """N, the number of samples of an epoch."""
        return sum(self.counts)

    def locate(self, position: int) -> SampleLocation:
        """Find the sample at global position g."""
        epoch, p = divmod(position, self.total)
        index, stream = divmod(p, self.streams)
        quotient, remainder = divmod(self.total, self.streams)
        rank = stream * quotient + min(stream, remainder) + index  # place in the concatenated shards
        permutation, ends = self._layout(epoch)
        slot = int(np.searchsorted(ends, rank, side="right"))
        return SampleLocation(epoch, int(permutation[slot]), rank - (int(ends[slot - 1]) if slot else 0))

    @cached_property
    def _layouts(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """What ``_layout`` has computed: epoch -> its value."""
        return {}

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an epoch's permutation of the shards, and where each of them ends; the newest two are kept."""
        if epoch not in self._layouts:
            permutation = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
            for old in list(self._layouts)[:-1]:
                del self._layouts[old]
            self._layouts[epoch] = permutation, np.cumsum(np.asarray(self.counts)[permutation])
        return self._layouts[epoch]

    def fill(
        self, position: int, make: Callable[[SampleLocation], Item], skipped: Callable[[str], None]
    ) -> Item:
        """Make the item at a position; a bad sample keeps its slot, filled by the next good one of its stream.

        Where the stream has none, the other streams of the epoch are asked: every sample at most once.

        Args:
            position: g.
            make: Makes the item of a place, raising ``SampleError`` where the sample is bad.
            skipped: Told the message of each bad sample.

        Raises:
            SampleError: Every sample was bad.
        """
        start = position - position % self.total
        stream = position % self.total % self.streams
        own = range(start + stream, start + self.total, self.streams)
        others = (g for g in range(start, start + self.total) if (g - start) % self.streams != stream)
        here = own.index(position)
        message = ""
        for g in chain(own[here:], own[:here], others):
            try:
                return make(self.locate(g))
            except SampleError as error:
                message = str(error)
                skipped(message)
        raise SampleError(
            expected="a readable sample", found=f"none among {self.total}", remedy=f"the last: {message}"
        )


class ShardReader:
    """Reads samples by place; asks for files when first needed.

    The member indices of the shards that were read last are kept: an object of 36 members takes 5 kB.

    Args:
        entries: The shards that ``SampleLocation.shard`` numbers.
        kept: How many indices; at least as many as there are shards that are read in turn.
    """

    def __init__(self, entries: Sequence[Entry], kept: int = 16) -> None:
        self.entries, self.kept = tuple(entries), kept
        self._indices: OrderedDict[tuple[str, str], tuple[MemberIndex, list[str]]] = OrderedDict()

    def prefetch(self, shard: int) -> None:
        """Say that a shard is read soon."""
        entry = self.entries[shard]
        entry.source.prefetch(entry.shard)

    def keys(self, shard: int) -> list[str]:
        """Return the sample keys of a shard, in tar order.

        Raises:
            SampleError: The shard's index cannot be read.
        """
        return self._index(shard)[1]

    def view_count(self, place: SampleLocation) -> int:
        """Return how many views the sample at a place has, by the shard's index."""
        index, keys = self._index(place.shard)
        members = index[keys[place.index]]
        return sum(VIEW_PATTERN.fullmatch(name) is not None for name in members)

    def read(self, place: SampleLocation, views: Sequence[int], extras: Sequence[str] = ()) -> Sample:
        """Read one sample, with only the views that are used.

        Args:
            place: Where it is.
            views: The views wanted.
            extras: Optional members wanted, where there are such.

        Raises:
            SampleError: The sample is bad; the message names shard and sample.
        """
        entry = self.entries[place.shard]
        index, keys = self._index(place.shard)
        key = keys[place.index]
        members = index[key]
        images = {view_member(view, suffix) for view in views for suffix in IMAGE_FORMATS}
        names = [name for name in members if name in images or name in NEEDED_MEMBERS or name in extras]
        try:
            content = entry.source.read(entry.shard, [members[name] for name in names])
            return decode_sample(key, dict(zip(names, content, strict=True)), views)
        except (SampleError, OSError) as error:
            if self.evict_if_corrupt(place):
                return self.read(place, views, extras)
            raise self.located(place, error) from error

    def evict_if_corrupt(self, place: SampleLocation) -> bool:
        """Look whether a bad sample is the fault of this machine's copy of its shard; if so, it can be read anew."""
        entry = self.entries[place.shard]
        return entry.source.evict_if_corrupt(entry.shard)

    def located(self, place: SampleLocation, error: Exception) -> SampleError:
        """Say of an error in a sample which sample of which shard it is and what to do."""
        key, what = self.keys(place.shard)[place.index], str(error)
        what = what if repr(key) in what else f"sample {key!r}: {what}"
        source = self.entries[place.shard].source
        path = f"{source.location}/{self.entries[place.shard].shard.name}"
        remedy = "delete this shard and the manifest, then render again" if source.local else "look there"
        return SampleError(f"{path}: {what}; {remedy}")

    def _index(self, shard: int) -> tuple[MemberIndex, list[str]]:
        """Return where the members of a shard's samples are, and the samples' keys."""
        entry = self.entries[shard]
        name = entry.source.location, entry.shard.name  # the same in all its appearances
        if name in self._indices:
            self._indices.move_to_end(name)
            return self._indices[name]
        try:
            index = entry.source.index(entry.shard)
        except (ShardError, StoreError) as error:
            raise SampleError(str(error)) from error
        if len(self._indices) >= self.kept:
            self._indices.popitem(last=False)
        self._indices[name] = index, list(index)
        return self._indices[name]
