"""Selection and reading of the objects to evaluate in a folder of shards."""

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
    """Error raised if no object matches the selection."""


class EvaluationDataset:
    """Selected objects in a folder of shards, in the order of the shards.

    Attributes:
        manifest: Manifest of the folder.
        samples: Ids and locations of the selected objects.

    Args:
        data: Path or URL of the folder of shards.
        split: Split from which objects are selected.
        pattern: Shell-style wildcard pattern that the ids must match.
        limit: Maximum number of objects, which are evenly spaced. If None, all objects are selected.

    Raises:
        NoObjectsError: No object matches the selection.
        InputError: The folder cannot be read, or ``limit`` is not positive.
    """

    def __init__(self, data: str, split: Split, pattern: str = "*", limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise InputError(expected="a limit of at least one object", found=limit, remedy="correct --limit")
        source = ShardSource(data)
        self.manifest = source.manifest()
        self._reader = ShardReader(
            [Entry(source, shard, 0) for shard in self.manifest.shards if not shard.rejected]
        )
        chosen = [
            (key, location) for key, location in self.samples_of(split) if fnmatch.fnmatchcase(key, pattern)
        ]
        count = len(chosen) if limit is None else min(limit, len(chosen))
        self.samples = [chosen[i * len(chosen) // count] for i in range(count)]
        if not self.samples:
            raise NoObjectsError(
                subject=data,
                expected=f"objects of the split {split!r} with ids that match {pattern!r}",
                found=f"none among {len(self.samples_of(split))}",
                remedy="pass another --split or --ids, or render with --held-out",
            )

    def samples_of(self, split: Split) -> list[tuple[str, SampleLocation]]:
        """Return the ids and locations of all objects of a split."""
        return [
            (key, SampleLocation(0, number, index))
            for number, entry in enumerate(self._reader.entries)
            if entry.shard.split == split
            for index, key in enumerate(self._reader.keys(number))
        ]

    def read(self, location: SampleLocation, protocol: Protocol) -> Sample:
        """Read an object with the views and surface points that a protocol requires.

        Raises:
            SampleError: The object cannot be read.
        """
        extras = [SURFACE_MEMBER] if protocol.surface is not None else []
        return self._reader.read(location, sorted({*protocol.inputs, *protocol.rendered}), extras)
