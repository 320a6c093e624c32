"""Folders of shards with a manifest, tar files and member indices.

    OUT/manifest.json            schema version, shards with counts, sizes and sha256, render settings
    OUT/train-000000.tar         WebDataset tar with samples of ``lrm_pl.data.schema``
    OUT/train-000000.index.json  sample key -> member name -> [offset, size] in the tar

The manifest is written last, so a folder without a manifest is not finished. All files are written atomically.
"""

import dataclasses
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from lrm_pl.data.schema import MAX_IMAGE_SIDE, SCHEMA_VERSION, SampleError
from lrm_pl.errors import InputError
from lrm_pl.scratch import ScratchFolder

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")

MANIFEST_NAME = "manifest.json"

#: Smallest image side that LPIPS with AlexNet accepts, in pixels.
LEAST_SIDE = 31

#: Maximum size of a member in bytes, which is the size of an uncompressed view of ``MAX_IMAGE_SIDE`` pixels a side.
MAX_MEMBER_BYTES = 4 * MAX_IMAGE_SIDE**2

#: Sample key -> member name -> (offset, size) of the content in bytes, in tar order.
MemberIndex = dict[str, dict[str, tuple[int, int]]]


class ShardError(InputError):
    """Error raised if a shard or a folder of shards is missing, unfinished or damaged."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Manifest entry of one shard.

    Attributes:
        name: File name of the tar, for example ``train-000000.tar``.
        split: Split of the samples.
        samples: Number of samples.
        bytes: Size of the tar in bytes.
        sha256: SHA-256 hash of the tar in lowercase hexadecimal digits.
        rejected: Whether the samples were rejected by a filter rule. Rejected samples are not used for training, but
            can be selected with ``data_tools repack``.
    """

    name: str
    split: Split
    samples: int
    bytes: int
    sha256: str
    rejected: bool = False

    @property
    def index_name(self) -> str:
        """File name of the member index, which is in the same folder as the tar."""
        return self.name.removesuffix(".tar") + ".index.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of a folder of shards.

    Attributes:
        shards: All shards in order.
        views: Number of views per sample.
        failures: Number of assets that could not be rendered, which are listed in ``failures.jsonl``.
        render: Render settings of the views (preset, resolution, samples, seed, normalization, renderer).
        schema_version: Version of the sample schema.
    """

    shards: tuple[Shard, ...]
    views: int
    failures: int
    render: dict[str, Any]
    schema_version: int = SCHEMA_VERSION

    @property
    def resolution(self) -> int | None:
        """Longer side of the views in pixels, or None if the render settings do not contain it."""
        found = self.render.get("resolution")
        return found if isinstance(found, int) else None

    def split(self, split: Split) -> tuple[Shard, ...]:
        """Return the shards of a split in order, except for rejected shards."""
        return tuple(shard for shard in self.shards if shard.split == split and not shard.rejected)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file in the folder of ``path`` that replaces ``path`` if the context exits without an error."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file in the folder of ``path``, flush it to disk and rename it to ``path``."""
    with new_file(path) as file:
        file.write(content)


def require_no_folder(out: Path) -> None:
    """Check that a folder does not exist.

    Raises:
        InputError: ``out`` exists.
    """
    if os.path.lexists(out):
        raise InputError(
            f"The folder {out} cannot be created because it exists. Choose another folder, or delete this folder"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder in the parent folder of ``out``.

    The folder is renamed to ``out`` if the context exits without an error, and is removed otherwise. If the process is
    killed, the next process that creates ``out`` removes the temporary folder.

    Raises:
        InputError: ``out`` exists.
    """
    require_no_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    place = ScratchFolder(f".{out.name}.", out.parent, ".partial")
    try:
        folder = place.path / out.name  # a subfolder, because it has default permissions
        folder.mkdir()
        yield folder
        require_no_folder(out)
        folder.rename(out)
    finally:
        place.remove()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, which indicates that a folder is finished."""
    write_atomically(
        folder / MANIFEST_NAME, (json.dumps(dataclasses.asdict(manifest), indent=2) + "\n").encode()
    )


def require_measurable_views(manifest: Manifest, where: str) -> None:
    """Check that views are large enough for LPIPS with AlexNet, which validation computes.

    Args:
        manifest: Manifest of the views.
        where: Path or URL for error messages.

    Raises:
        InputError: The longer side of the views is smaller than ``LEAST_SIDE``.
    """
    if (found := manifest.resolution) is not None and found < LEAST_SIDE:
        raise InputError(
            subject=where,
            expected=f"views of at least {LEAST_SIDE} pixels, which LPIPS with AlexNet requires",
            found=f"{found} pixels",
            remedy="render the views again with a larger value of RES",
        )


def read_manifest(folder: Path) -> Manifest:
    """Read and validate ``manifest.json``, and check the existence and size of all shards.

    Raises:
        ShardError: The manifest is missing or invalid, or a shard is missing or has an unexpected size.
    """
    path = folder / MANIFEST_NAME
    remedy = f"run `make render-shards OUT={folder}`, which resumes rendering"
    if not path.is_file():
        raise ShardError(expected=f"finished shards in {folder}", found=f"no {MANIFEST_NAME}", remedy=remedy)
    manifest = parse_manifest(path.read_bytes(), str(path))
    for shard in manifest.shards:
        for file in (folder / shard.name, folder / shard.index_name):
            if not file.is_file():
                raise ShardError(f"the shard file {file}", "none", f"delete {path} and {remedy}")
        if (size := (folder / shard.name).stat().st_size) != shard.bytes:
            raise ShardError(
                subject=folder / shard.name,
                expected=f"{shard.bytes} bytes",
                found=f"a damaged file of {size} bytes",
                remedy=f"delete this file and {path}, and {remedy}",
            )
    return manifest


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Parse the content of a ``manifest.json``.

    Args:
        content: The file content.
        where: Path or URL for error messages.

    Raises:
        ShardError: The schema version is unknown, a field is invalid, or there are no samples.
    """
    try:
        record: Any = json.loads(content)
        if (version := record.get("schema_version")) != SCHEMA_VERSION:
            raise ShardError(
                subject=where,
                expected=f"schema version {SCHEMA_VERSION}",
                found=f"{version!r}",
                remedy="render the shards again with this version of lrm_pl, or use the version that wrote the shards",
            )
        shards = tuple(_checked_shard(entry) for entry in record.pop("shards"))
        if repeated := [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]:
            raise ValueError(f"two entries for the shard {repeated[0]}")
        for name, kind in (("views", int), ("failures", int), ("render", dict)):
            if type(record[name]) is not kind:
                raise TypeError(f"the value {record[name]!r} for {name}")
        if not any(shard.samples for shard in shards):
            raise ValueError("no samples")
        return Manifest(shards=shards, **record)
    except ShardError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ShardError(
            subject=where,
            expected="a valid manifest of shards",
            found=error,
            remedy="render the shards again, or copy the whole folder again",
        ) from error


def read_index(folder: Path, shard: Shard) -> MemberIndex:
    """Read and validate the member index of a shard.

    Raises:
        ShardError: The index is missing or does not match the tar.
    """
    path = folder / shard.index_name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShardError("a member index", error, f"render the shard {shard.name} again", path) from error
    return parse_index(content, str(path), shard)


def parse_index(content: bytes, where: str, shard: Shard) -> MemberIndex:
    """Parse the content of a member index.

    Args:
        content: The file content.
        where: Path or URL for error messages.
        shard: The shard to which the index belongs.

    Raises:
        ShardError: The index does not match the shard.
    """
    try:
        index = {
            str(key): {str(name): (int(offset), int(size)) for name, (offset, size) in members.items()}
            for key, members in json.loads(content).items()
        }
        spans = [span for members in index.values() for span in members.values()]
        if (large := max((size for _, size in spans), default=0)) > MAX_MEMBER_BYTES:
            raise ValueError(f"a member of {large} bytes, which exceeds the maximum of {MAX_MEMBER_BYTES}")
        if len(index) != shard.samples:
            raise ValueError(f"{len(index)} samples instead of {shard.samples}")
        if any(offset < 0 or size < 0 or offset + size > shard.bytes for offset, size in spans):
            raise ValueError(f"a member outside the {shard.bytes} bytes of the tar")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ShardError(
            subject=where,
            expected=f"a valid member index of the shard {shard.name}",
            found=error,
            remedy=f"render the shard {shard.name} again",
        ) from error
    return index


def read_members(tar: Path, spans: Iterable[tuple[int, int]]) -> list[bytes]:
    """Read byte ranges of a shard.

    Args:
        tar: Path of the shard.
        spans: Offset and size of each range in bytes.

    Raises:
        SampleError: A range extends beyond the end of the file.
        OSError: The file cannot be read.
    """
    contents = []
    with open(tar, "rb") as file:
        for offset, size in spans:
            file.seek(offset)
            content = file.read(size)
            if len(content) != size:
                raise SampleError(
                    f"{size} bytes at offset {offset}", f"{len(content)} bytes in a truncated file"
                )
            contents.append(content)
    return contents


def read_samples(folder: Path, shard: Shard) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key and the members of each sample of a shard in tar order.

    Raises:
        ShardError: The index does not match the tar.
        SampleError: A member extends beyond the end of the file.
    """
    for key, members in read_index(folder, shard).items():
        yield key, dict(zip(members, read_members(folder / shard.name, members.values()), strict=True))


def _checked_shard(entry: dict[str, Any]) -> Shard:
    shard = Shard(**entry)
    if not (
        re.fullmatch(r"[^/\0]+\.tar", shard.name)
        and re.fullmatch("[0-9a-f]{64}", shard.sha256)
        and shard.split in SPLITS
        and all(type(number) is int and number >= 0 for number in (shard.samples, shard.bytes))
        and type(shard.rejected) is bool
    ):
        raise ValueError(f"the invalid entry {entry}")
    return shard
