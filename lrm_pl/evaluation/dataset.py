"""Which objects of a folder of shards are measured, and reading them."""

import fnmatch

from lrm_pl.data.manifest import Split
from lrm_pl.data.mixture import Entry
from lrm_pl.data.order import SampleLocation
from lrm_pl.data.reader import ShardReader
from lrm_pl.data.schema import SURFACE_MEMBER, Sample
from lrm_pl.data.source import ShardSource
from lrm_pl.errors import InputError
from lrm_pl.evaluation.protocols import Protocol


class NoObjectsError(InputError):
    """A folder has no such objects."""


class EvaluationDataset:
    """The objects that are measured, in the order of the shards.

    Attributes:
        manifest: Of the folder.
        chosen: Their ids and places.

    Args:
        data: The folder of shards, or its URL.
        split: Which objects.
        pattern: What their ids fit, as file names fit a shell's patterns.
        limit: Most objects, evenly spread; None: all.

    Raises:
        NoObjectsError: There are none.
        InputError: The folder is not what it should be.
    """

    def __init__(self, data: str, split: Split, pattern: str = "*", limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise InputError(expected="a limit of at least one object", found=limit, remedy="correct --limit")
        source = ShardSource(data)
        self.manifest = source.manifest()
        self._reader = ShardReader(
            [Entry(source, shard, 0) for shard in self.manifest.shards if not shard.rejected]
        )
        chosen = [(key, place) for key, place in self.samples_of(split) if fnmatch.fnmatchcase(key, pattern)]
        count = len(chosen) if limit is None else min(limit, len(chosen))
        self.samples = [chosen[i * len(chosen) // count] for i in range(count)]
        if not self.samples:
            raise NoObjectsError(
                expected=f"objects of the split {split!r} named {pattern} in {data}",
                found=f"none of {len(self.samples_of(split))}",
                remedy="choose --split or --ids, or render with --held-out",
            )

    def samples_of(self, split: Split) -> list[tuple[str, SampleLocation]]:
        """List all objects of a split: id and place."""
        return [
            (key, SampleLocation(0, number, index))
            for number, entry in enumerate(self._reader.entries)
            if entry.shard.split == split
            for index, key in enumerate(self._reader.keys(number))
        ]

    def read(self, place: SampleLocation, protocol: Protocol) -> Sample:
        """Read an object with the views, and the surface, that a protocol needs.

        Raises:
            SampleError: It is bad.
        """
        extras = [SURFACE_MEMBER] if protocol.surface is not None else []
        return self._reader.read(place, sorted({*protocol.inputs, *protocol.rendered}), extras)
