"""Writing of tar shards with webdataset, and byte ranges of the members.

A tar is a sequence of records of 512 bytes. Each member consists of a header record and the content, which is padded to
a multiple of 512 bytes. Some writers add header records before the header record of a member, for example pax headers
with fractional modification times. The readers in this package skip these records.
"""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from lrm_pl.data.manifest import MemberIndex, Shard, ShardError, Split, new_file, write_atomically
from lrm_pl.data.schema import KEY_PATTERN
from lrm_pl.errors import error_subject
from lrm_pl.paths import hash_file

Size = TypeVar("Size", int, npt.NDArray[np.int64])

#: Size of a tar record in bytes.
RECORD: Final = 512

#: Names of members: the key of the sample, a dot and the name without "/".
MEMBER_PATTERN: Final = re.compile(rf"{KEY_PATTERN.pattern}\.[^/]+", re.DOTALL)

#: The end of a tar, which consists of two records of zeros.
END_OF_ARCHIVE: Final = bytes(2 * RECORD)

#: Maximum accepted size of the padding after the last member in bytes.
_MAX_PADDING = 1 << 20


def padded(size: Size) -> Size:
    """Return a size in bytes, rounded up to full tar records."""
    return -(-size // RECORD) * RECORD


def write_shard(
    folder: Path,
    name: str,
    split: Split,
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    *,
    rejected: bool = False,
) -> Shard:
    """Write a tar and a member index atomically and deterministically.

    Args:
        folder: Folder of the shards.
        name: File name of the tar.
        split: Split of the samples.
        samples: Key and members (``schema.encode_sample``) of each sample, in order.
        rejected: Whether a filter rule rejected the samples.

    Returns:
        The manifest entry of the shard.
    """
    from webdataset import TarWriter  # imports torch if it is installed

    with new_file(folder / name) as file:
        with TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer:
            for key, members in samples:
                assert KEY_PATTERN.fullmatch(key), key
                writer.write({"__key__": key, **members})
        file.flush()
        shard = describe_shard(
            Path(file.name), name, split, index := scan_tar(Path(file.name)), rejected=rejected
        )
        write_atomically(folder / shard.index_name, encode_index(index))
    return shard


def describe_shard(
    path: Path, name: str, split: Split, index: MemberIndex, *, rejected: bool = False
) -> Shard:
    """Return the manifest entry of a tar.

    Args:
        path: Path of the tar.
        name: File name of the shard.
        split: Split of the samples.
        index: Member index of the tar.
        rejected: Whether a filter rule rejected the samples.
    """
    return Shard(name, split, len(index), path.stat().st_size, hash_file(path), rejected)


def encode_index(index: MemberIndex) -> bytes:
    """Encode a member index as JSON."""
    return json.dumps(index, indent=0).encode()


def scan_tar(path: Path) -> MemberIndex:
    """Read the member index of a shard from the headers of the tar.

    Raises:
        ShardError: The file is not a complete tar of regular files, or the members of a sample are not adjacent.
    """
    index: MemberIndex = {}
    key, end = "", 0
    with error_subject(path):
        try:
            for member in _regular_files(path):
                sample, _, name = member.name.partition(".")
                if sample != key and sample in index:
                    raise ShardError(
                        expected="adjacent members of each sample",
                        found=f"members of {sample!r} in two places",
                    )
                members = index.setdefault(sample, {})
                if name in members or (members and member.offset != end):
                    raise ShardError(
                        expected=f"each member of {sample!r} once, without gaps between members",
                        found=f"{member.name!r} at byte {member.offset}",
                    )
                members[name] = (member.offset_data, member.size)
                key, end = sample, member.offset_data + padded(member.size)
        except tarfile.TarError as error:
            raise ShardError(
                expected="a tar file", found=error, remedy="copy or write the shard again"
            ) from error
        # ``tarfile`` stops without an error at the first header that it cannot read.
        with open(path, "rb") as file:
            file.seek(end)
            rest = file.read(_MAX_PADDING + 1)
        if not len(END_OF_ARCHIVE) <= len(rest) <= _MAX_PADDING or any(rest):
            raise ShardError(
                expected=f"the end of the archive at byte {end}",
                found=f"{len(rest)} other bytes",
                remedy="copy or write the shard again, because it is truncated or damaged",
            )
    return index


def _regular_files(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, which must be regular files named KEY.NAME without extended names or sizes."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            is_plain = (
                member.isreg() and not member.issparse() and not {"path", "size"} & member.pax_headers.keys()
            )
            if not is_plain or not MEMBER_PATTERN.fullmatch(member.name) or len(member.name) >= 100:
                raise ShardError(
                    expected="regular files named KEY.NAME with a key of letters, digits, '_' and '-'",
                    found=f"{member.name!r} of type {member.type!r} at byte {member.offset}",
                )
            yield member


def record_spans(members: Mapping[str, tuple[int, int]], names: Iterable[str]) -> list[tuple[int, int]]:
    """Return the byte ranges of members including header records and padding.

    Args:
        members: Mapping from member name to offset and size of the content in bytes.
        names: Names of the members to include, in tar order.

    Returns:
        Offset and size of each range in bytes. Adjacent ranges are merged.
    """
    spans: list[tuple[int, int]] = []
    for offset, size in (members[name] for name in names):
        start, length = offset - RECORD, RECORD + padded(size)
        if spans and sum(spans[-1]) == start:
            start, length = spans[-1][0], spans.pop()[1] + length
        spans.append((start, length))
    return spans
