"""Random access to samples in shards. Only the required members of a sample are read."""

import io
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

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

Result = TypeVar("Result")


class PackedIndex:
    """The member index of a shard, stored in NumPy arrays.

    The arrays use about 6 bytes per member, and 16 bytes plus the size of the key per sample.

    Args:
        index: Mapping from sample keys to mappings from member names to offset and size in bytes.

    Raises:
        ShardError: The members of a sample are not adjacent, or a sample has no members.
    """

    def __init__(self, index: Mapping[str, Mapping[str, tuple[int, int]]]) -> None:
        names: dict[str, int] = {}
        members = [
            (names.setdefault(name, len(names)), offset, size)
            for sample in index.values()
            for name, (offset, size) in sample.items()
        ]
        ids, offsets, sizes = np.array(members, np.int64).reshape(-1, 3).T
        counts = np.array([len(sample) for sample in index.values()], np.int64)
        if not counts.all():
            raise ShardError(expected="at least one member in each sample", found="a sample without members")
        # Offset of the first header record of each sample, and cumulative number of members.
        self._ends = np.cumsum(counts)
        first = self._ends - counts
        self._starts = offsets[first] - RECORD
        # Index in ``_names``, size and number of header records of each member.
        header_starts = np.concatenate([[0], offsets[:-1] + padded(sizes[:-1])])
        header_starts[first] = self._starts
        headers, rest = np.divmod(offsets - header_starts, RECORD)
        if rest.any() or not ((headers >= 1) & (headers <= 255)).all():
            raise ShardError(expected="adjacent members of each sample", found="gaps between members")
        self._headers, self._sizes = headers.astype(np.uint8), sizes.astype(np.uint32)
        self._ids = ids.astype(np.min_scalar_type(len(names)))
        self._names = tuple(names)
        self._keys = np.array([key.encode() for key in index], dtype=np.bytes_)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return sum(a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray))

    def key(self, number: int) -> str:
        """Return the key of a sample."""
        return bytes(self._keys[number]).decode()

    def members(self, number: int) -> dict[str, tuple[int, int]]:
        """Return a mapping from member name to offset and size in bytes for a sample."""
        part = slice(self._ends[number - 1] if number else 0, self._ends[number])
        columns = (column[part].tolist() for column in (self._ids, self._sizes, self._headers))
        offset, members = int(self._starts[number]), dict[str, tuple[int, int]]()
        for name, size, headers in zip(*columns, strict=True):
            offset += headers * RECORD
            members[self._names[name]] = (offset, size)
            offset += padded(size)
        return members


class ShardReader:
    """Reader of samples at given locations. The index of a shard is read when it is first needed.

    Args:
        entries: The shards to which ``SampleLocation.shard`` refers.
        kept: Maximum number of indices in memory. The least recently used index is evicted first. This number should
            be at least the number of shards that are read in alternation.
    """

    def __init__(self, entries: Sequence[Entry], kept: int = 16) -> None:
        self.entries, self.kept = tuple(entries), kept
        self._indices: OrderedDict[tuple[str, str], PackedIndex] = OrderedDict()

    def prefetch(self, shard: int) -> None:
        """Start copying a remote shard to the cache."""
        entry = self.entries[shard]
        entry.source.prefetch(entry.shard)

    def keys(self, shard: int) -> list[str]:
        """Return the sample keys of a shard in tar order.

        Raises:
            SampleError: The index of the shard cannot be read.
        """
        index = self._index(shard)
        return [index.key(number) for number in range(len(index))]

    def key(self, location: SampleLocation) -> str:
        """Return the key of a sample.

        Raises:
            SampleError: The index of the shard cannot be read.
        """
        return self._index(location.shard).key(location.index)

    def view_count(self, location: SampleLocation) -> int:
        """Return the number of views of a sample according to the index of the shard.

        Raises:
            SampleError: The index of the shard cannot be read.
        """
        members = self._index(location.shard).members(location.index)
        return sum(VIEW_PATTERN.fullmatch(name) is not None for name in members)

    def read_members(
        self, location: SampleLocation, views: Sequence[int], extras: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Read the members of one sample without decoding them.

        The records of the required members, followed by two records of zeros, form a tar, which is parsed with
        webdataset.

        Args:
            location: Location of the sample.
            views: Indices of the views to read.
            extras: Names of optional members to read if they exist.

        Returns:
            A dictionary in the format of webdataset, with ``__key__``, ``__url__`` and the content of each member.

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
        samples, found = [], "other content"
        if records and records[0].startswith(prefix):  # otherwise, webdataset may decompress other formats
            try:
                samples = list(group_by_keys(tar_file_expander([tar])))
            except (tarfile.TarError, ValueError) as error:
                found = str(error)
        if [sample["__key__"] for sample in samples] != [key]:
            raise SampleError(expected=f"the members of {key!r} at the offsets in the index", found=found)
        return samples[0]

    def read(self, location: SampleLocation, views: Sequence[int], extras: Sequence[str] = ()) -> Sample:
        """Read and decode one sample.

        Args:
            location: Location of the sample.
            views: Indices of the views to read.
            extras: Names of optional members to read if they exist.

        Raises:
            SampleError: The sample cannot be read or is invalid. The message contains the shard and the sample.
        """
        return self.read_as(location, views, lambda sample: sample, extras)

    def read_as(
        self,
        location: SampleLocation,
        views: Sequence[int],
        convert: Callable[[Sample], Result],
        extras: Sequence[str] = (),
    ) -> Result:
        """Read and decode one sample, and apply a function to the sample.

        Args:
            location: Location of the sample.
            views: Indices of the views to read.
            convert: Function that is applied to the sample.
            extras: Names of optional members to read if they exist.

        Raises:
            SampleError: The sample cannot be read or is invalid, or ``convert`` raised ``SampleError``. The message
                contains the shard and the sample.
        """
        key = self.key(location)
        try:
            return convert(decode_sample(key, self.read_members(location, views, extras), views))
        except SampleError as error:
            if self.evict_if_corrupt(location):
                return self.read_as(location, views, convert, extras)
            raise self.located(location, error) from error

    def evict_if_corrupt(self, location: SampleLocation) -> bool:
        """Check the cached copy of a shard after a bad sample, and remove the copy if it is damaged.

        Returns:
            Whether the copy was removed.
        """
        entry = self.entries[location.shard]
        return entry.source.evict_if_corrupt(entry.shard)

    def located(self, location: SampleLocation, error: Exception) -> SampleError:
        """Return the error of a bad sample with the shard, the key and a remedy in the message.

        Raises:
            SampleError: The index of the shard cannot be read.
        """
        entry, key, message = self.entries[location.shard], self.key(location), str(error)
        message = message if repr(key) in message else f"sample {key!r}: {message}"
        remedy = "Check this URL"
        if entry.source.local:
            remedy = "Delete this shard and the manifest, and render the shard again"
        return SampleError(f"{entry.source.location}/{entry.shard.name}: {message}. {remedy}")

    def _index(self, shard: int) -> PackedIndex:
        """Return the index of a shard. Repeated entries of a shard use the same index."""
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
