"""The command ``python -m data_tools index``, which indexes shards written with the ``webdataset`` package."""

import shlex
from collections import Counter
from pathlib import Path

from data_tools.shards.pool import processes
from lrm_pl.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    ShardError,
    read_members,
    write_atomically,
    write_manifest,
)
from lrm_pl.data.schema import SampleError, decode_image, decode_sample
from lrm_pl.data.tar import describe_shard, encode_index, scan_tar
from lrm_pl.errors import InputError, counted


def index_folder(folder: Path, jobs: int | None = None) -> Manifest:
    """Write a member index for each tar file in a folder, and ``manifest.json``.

    Shards whose names begin with ``val`` are assigned to the split "val", and all other shards to the split "train".
    Each view is decoded to verify that it is valid.

    Args:
        folder: Folder of tar shards with the schema in ``lrm_pl.data.schema``.
        jobs: Number of processes. If None, the number of available CPU cores is used.

    Returns:
        The manifest.

    Raises:
        InputError: The folder has a manifest or no shards, a shard or sample is damaged, two samples have the same key,
            or samples differ in the number or size of the views.
    """
    if (folder / MANIFEST_NAME).exists():
        raise InputError(
            subject=folder,
            expected=f"shards without {MANIFEST_NAME}",
            found=MANIFEST_NAME,
            remedy=f"delete {MANIFEST_NAME} to index the folder again",
        )
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise InputError(subject=folder, expected="shards named *.tar", found="none")
    with processes(jobs) as pool:
        indexed = list(pool.map(_index_shard, tars))
    keys = Counter(key for _, shard_keys, _ in indexed for key in shard_keys)
    if not keys:
        raise ShardError(subject=folder, expected="shards with samples", found="none")
    key, count = keys.most_common(1)[0]
    if count > 1:
        raise ShardError(subject=folder, expected="unique sample keys", found=f"{key!r} {count} times")
    shapes = sorted({shape for _, _, shard_shapes in indexed for shape in shard_shapes})
    if len(shapes) > 1:
        raise ShardError(
            subject=folder,
            expected="samples with the same number and size of views",
            found=" and ".join(f"{views} views of {w} x {h} pixels" for views, w, h in shapes[:4]),
        )
    ((views, width, height),) = shapes
    render = {"renderer": "unknown", "resolution": max(width, height)}
    manifest = Manifest(tuple(shard for shard, _, _ in indexed), views, 0, render)
    write_manifest(folder, manifest)
    print(f"{counted(len(keys), 'object')} in {counted(len(tars), 'shard')}")
    print(f"next           make train DATA={shlex.quote(str(folder))}")
    return manifest


def _index_shard(path: Path) -> tuple[Shard, list[str], set[tuple[int, int, int]]]:
    """Check a shard and write its member index.

    Returns:
        The manifest entry, the keys, and the set of tuples (views, width, height) of the samples.

    Raises:
        ShardError: The shard or a sample is damaged.
    """
    index = scan_tar(path)
    shapes = set()
    for key, members in index.items():
        try:
            content = dict(zip(members, read_members(path, members.values()), strict=True))
            sample = decode_sample(key, content)
            for view in sample.views:
                height, width, _ = decode_image(key, view).shape
                shapes.add((len(sample.views), width, height))
        except SampleError as error:
            raise ShardError(f"{path}: {error}") from error
    shard = describe_shard(path, path.name, "val" if path.name.startswith("val") else "train", index)
    write_atomically(path.with_name(shard.index_name), encode_index(index))
    return shard, list(index), shapes
