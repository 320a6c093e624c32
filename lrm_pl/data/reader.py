"""Random access to samples of shards: reads only the members that are used."""

import io
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from lrm_pl.data.manifest import ShardError
from lrm_pl.data.mixture import Entry
from lrm_pl.data.order import SampleLocation
from lrm_pl.data.schema import (
    IMAGE_FORMATS,
    NEEDED_MEMBERS,
    VIEW_PATTERN,
    Sample,
    SampleError,
    decode_sample,
    view_member,
)
from lrm_pl.data.tar import END_OF_ARCHIVE, RECORD, padded, record_spans
from lrm_pl.storage import StoreError


class PackedIndex:
    """The member index of one shard in numpy arrays: about 6 bytes per member, and 16 and the key per sample.

    Args:
        index: Sample key -> member name -> (offset, size).

    Raises:
        ShardError: The members of a sample are not adjacent.
    """

    def __init__(self, index: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
        names: dict[str, int] = {}
        ids, sizes, gaps, starts = list[int](), list[int](), list[int](), list[int]()
        for key, members in index.items():
            end = None
            for name, (offset, size) in members.items():
                gap, rest = (1, 0) if end is None else divmod(offset - end, RECORD)
                if rest or not 1 <= gap <= 255:
                    raise ShardError(
                        expected=f"adjacent members of {key!r}", found=f"{name} at byte {offset}"
                    )
                if end is None:
                    starts.append(offset - RECORD)
                gaps.append(gap)
                ids.append(names.setdefault(name, len(names)))
                sizes.append(size)
                end = offset + padded(size)
            if end is None:
                raise ShardError(expected=f"members of {key!r}", found="none")
        self._names = tuple(names)
        self._keys = np.array([key.encode() for key in index], dtype=np.bytes_)
        # Per sample: byte of its first header record, and number of members up to its last.
        self._starts = np.array(starts, np.int64)
        self._ends = np.cumsum([len(members) for members in index.values()], dtype=np.int64)
        # Per member: index in ``_names``, size, and header records before it.
        self._ids, self._sizes = np.array(ids, np.min_scalar_type(len(names))), np.array(sizes, np.uint32)
        self._gaps = np.array(gaps, np.uint8)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, bytes."""
        return sum(a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray))

    def key(self, number: int) -> str:
        """Return the key of a sample."""
        return bytes(self._keys[number]).decode()

    def members(self, number: int) -> dict[str, tuple[int, int]]:
        """Return member name -> (offset, size) of a sample."""
        part = slice(int(self._ends[number - 1]) if number else 0, int(self._ends[number]))
        columns = (column[part].tolist() for column in (self._ids, self._sizes, self._gaps))
        offset, members = int(self._starts[number]), dict[str, tuple[int, int]]()
        for name, size, gap in zip(*columns, strict=True):
            offset += gap * RECORD
            members[self._names[name]] = (offset, size)
            offset += padded(size)
        return members


class ShardReader:
    """Reads samples by their locations; a shard's index is read when first needed.

    Args:
        entries: The shards that ``SampleLocation.shard`` numbers.
        kept: Number of indices to keep, least recently used evicted first; at least the number of shards that are
            read in turn.
    """

    def __init__(self, entries: Sequence[Entry], kept: int = 16) -> None:
        self.entries, self.kept = tuple(entries), kept
        self._indices: OrderedDict[tuple[str, str], PackedIndex] = OrderedDict()

    def prefetch(self, shard: int) -> None:
        """Start copying a remote shard that is needed soon."""
        entry = self.entries[shard]
        entry.source.prefetch(entry.shard)

    def keys(self, shard: int) -> list[str]:
        """Return the sample keys of a shard, in tar order.

        Raises:
            SampleError: The shard's index cannot be read.
        """
        index = self._index(shard)
        return [index.key(number) for number in range(len(index))]

    def key(self, location: SampleLocation) -> str:
        """Return the key of a sample.

        Raises:
            SampleError: The shard's index cannot be read.
        """
        return self._index(location.shard).key(location.index)

    def view_count(self, location: SampleLocation) -> int:
        """Return the number of views of a sample, by the shard's index.

        Raises:
            SampleError: The shard's index cannot be read.
        """
        members = self._index(location.shard).members(location.index)
        return sum(VIEW_PATTERN.fullmatch(name) is not None for name in members)

    def read_members(
        self, location: SampleLocation, views: Sequence[int], extras: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Read one sample in the form of webdataset: ``__key__``, ``__url__`` and member name -> bytes.

        The records of the members that are used, followed by two records of zeros, are themselves a tar.

        Args:
            location: Location of the sample.
            views: Indices of the views to read.
            extras: Optional members to read where they exist.

        Raises:
            SampleError: The members cannot be read.
        """
        entry, index = self.entries[location.shard], self._index(location.shard)
        key, members = index.key(location.index), index.members(location.index)
        images = {view_member(view, suffix) for view in views for suffix in IMAGE_FORMATS}
        names = [name for name in members if name in images or name in NEEDED_MEMBERS or name in extras]
        url, prefix = f"{entry.source.location}/{entry.shard.name}", f"{key}.".encode()
        try:
            records = entry.source.read(entry.shard, record_spans(members, names))
        except OSError as error:
            raise SampleError(str(error)) from error
        tar = {"url": url, "stream": io.BytesIO(b"".join([*records, END_OF_ARCHIVE]))}
        samples, found = [], "others"
        if records and records[0].startswith(prefix):  # webdataset would decompress other formats
            try:
                samples = list(group_by_keys(tar_file_expander([tar])))
            except (tarfile.TarError, ValueError) as error:
                found = str(error)
        if [sample["__key__"] for sample in samples] != [key]:
            raise SampleError(expected=f"members of {key!r} at the offsets in the index", found=found)
        return samples[0]

    def read(self, location: SampleLocation, views: Sequence[int], extras: Sequence[str] = ()) -> Sample:
        """Read and decode one sample, with only the views that are used.

        Args:
            location: Location of the sample.
            views: Indices of the views to read.
            extras: Optional members to read where they exist.

        Raises:
            SampleError: The sample is bad; the message names shard and sample.
        """
        key = self.key(location)
        try:
            return decode_sample(key, self.read_members(location, views, extras), views)
        except SampleError as error:
            if self.evict_if_corrupt(location):
                return self.read(location, views, extras)
            raise self.located(location, error) from error

    def evict_if_corrupt(self, location: SampleLocation) -> bool:
        """Check the cached copy of a shard after a bad sample; returns whether it was damaged and has been removed."""
        entry = self.entries[location.shard]
        return entry.source.evict_if_corrupt(entry.shard)

    def located(self, location: SampleLocation, error: Exception) -> SampleError:
        """Return the error of a bad sample with its shard, its key and a remedy added.

        Raises:
            SampleError: The shard's index cannot be read, which the message states.
        """
        entry, key, message = self.entries[location.shard], self.key(location), str(error)
        message = message if repr(key) in message else f"sample {key!r}: {message}"
        remedy = (
            "Delete this shard and the manifest, then render again"
            if entry.source.local
            else "Check this URL"
        )
        return SampleError(f"{entry.source.location}/{entry.shard.name}: {message}. {remedy}")

    def _index(self, shard: int) -> PackedIndex:
        """Return the index of a shard; repeated entries of a shard have one index."""
        entry = self.entries[shard]
        name = entry.source.location, entry.shard.name
        if name in self._indices:
            self._indices.move_to_end(name)
            return self._indices[name]
        try:
            index = PackedIndex(entry.source.index(entry.shard))
        except (ShardError, StoreError) as error:
            raise SampleError(str(error)) from error
        if len(self._indices) >= self.kept:
            self._indices.popitem(last=False)
        self._indices[name] = index
        return index
