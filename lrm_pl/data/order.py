"""The global order of training samples, which is a pure function of seed and position.

In each epoch e, the shards of the training split and the samples in each shard are permuted depending on (seed, e). The
N samples are then divided into S contiguous streams whose lengths differ by at most 1. Position p in the epoch refers
to element p // S of stream p mod S, and the global position is g = e N + p. Each batch of G samples
contains the samples at the next G global positions, so a batch can contain samples of two epochs, and no sample is
dropped. The global position is the complete state of the data loader.
"""

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from itertools import chain

import numpy as np


@dataclasses.dataclass(frozen=True)
class SampleLocation:
    """Location of a sample.

    Attributes:
        epoch: Index of the epoch.
        shard: Index of the shard.
        index: Index of the sample in the shard.
    """

    epoch: int
    shard: int
    index: int


@dataclasses.dataclass(frozen=True)
class SampleOrder:
    """The global order of samples.

    Attributes:
        counts: Number of samples per shard.
        seed: Seed of the permutations.
        streams: Number of streams per epoch. Consecutive samples come from different streams, and thus mostly from
            different shards.
    """

    counts: tuple[int, ...]
    seed: int
    streams: int

    @cached_property
    def total(self) -> int:
        """Number of samples per epoch."""
        return sum(self.counts)

    def locate(self, position: int) -> SampleLocation:
        """Return the location of the sample at a global position."""
        epoch, p = divmod(position, self.total)
        index, stream = divmod(p, self.streams)
        quotient, remainder = divmod(self.total, self.streams)
        rank = stream * quotient + min(stream, remainder) + index  # in the concatenated shards
        permutation, ends = self._layout(epoch)
        slot = int(np.searchsorted(ends, rank, side="right"))
        shard = int(permutation[slot])
        return SampleLocation(
            epoch, shard, int(self._shuffled(epoch, shard)[rank - (ends[slot - 1] if slot else 0)])
        )

    def candidates(self, position: int) -> Iterator[SampleLocation]:
        """Yield the location of the sample at a global position, followed by the locations of possible replacements.

        The replacements are the remaining samples of the same stream, followed by the samples of all other streams.
        Each sample of the epoch is yielded once.
        """
        start = position - position % self.total
        stream = position % self.total % self.streams
        own = range(start + stream, start + self.total, self.streams)
        others = (g for g in range(start, start + self.total) if (g - start) % self.streams != stream)
        first = own.index(position)
        return map(self.locate, chain(own[first:], own[:first], others))

    @cached_property
    def _layouts(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Cached results of ``_layout`` by epoch."""
        return {}

    @cached_property
    def _shuffles(self) -> dict[tuple[int, int], np.ndarray]:
        """Cached results of ``_shuffled`` by epoch and shard."""
        return {}

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the permutation of the shards in an epoch, and the cumulative numbers of samples.

        The results of two epochs are cached.
        """
        if epoch not in self._layouts:
            permutation = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
            for old in list(self._layouts)[:-1]:
                del self._layouts[old]
            self._layouts[epoch] = permutation, np.cumsum(np.asarray(self.counts)[permutation])
        return self._layouts[epoch]

    def _shuffled(self, epoch: int, shard: int) -> np.ndarray:
        """Return the permutation of the samples of a shard in an epoch. Permutations of shards in use are cached."""
        if (key := (epoch, shard)) not in self._shuffles:
            if len(self._shuffles) >= 4 * self.streams:
                del self._shuffles[next(iter(self._shuffles))]
            permutation = np.random.default_rng([self.seed, epoch, shard]).permutation(self.counts[shard])
            self._shuffles[key] = permutation.astype(np.uint32)
        return self._shuffles[key]
