"""The commands ``python -m data_tools repack`` and ``merge``, which create a folder of shards from existing shards.

They change the resolution, the shard size, the split or the selection of objects, or merge folders. Images that are not
resized are copied unchanged. The output folder is created atomically.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.quality.contact_sheet import write_contact_sheet
from data_tools.quality.filter_table import read_measures
from data_tools.quality.geometry import resize_geometry
from data_tools.quality.measures import Rule, broken_rules, parse_rule
from data_tools.quality.validate import find_file_problems
from data_tools.rendering.shard_folder import FAILURES_NAME, read_failures, write_failures
from data_tools.rendering.shard_plan import default_shard_size, plan_shards
from data_tools.shards.pool import EncodedSample, processes, write_shards
from lrm_pl.data.manifest import (
    Manifest,
    Shard,
    ShardError,
    new_folder,
    read_index,
    read_manifest,
    read_members,
    write_manifest,
)
from lrm_pl.data.schema import (
    VIEW_PATTERN,
    SampleError,
    decode_image,
    decode_sample,
    encode_image,
    encode_sample,
)
from lrm_pl.errors import InputError, counted

#: Camera settings in the manifest of rendered shards.
_CAMERAS = dict.fromkeys(("preset", "radius_range", "height_range", "fov_range_deg"))

#: Settings in the manifest that define which optional members the samples contain, with the default values.
_GEOMETRY = dict.fromkeys(("depth", "normals", "surface"), False)

_MERGE_REMEDY = (
    "use `--data.also` to train on the folders without merging them, if no validation object of one folder is a "
    "training object of another"
)


class RepackError(InputError):
    """Raised if folders are incompatible with each other or with the options."""


@dataclasses.dataclass(frozen=True)
class SampleSource:
    """Location of a sample to copy.

    Attributes:
        folder: Folder of the shard.
        shard: Shard that contains the sample.
        members: Mapping from member names to (offset, size) in bytes.
    """

    folder: Path
    shard: Shard
    members: Mapping[str, tuple[int, int]]


def repack(
    folders: Sequence[Path],
    out: Path,
    resolution: int | None = None,
    shard_size: int | None = None,
    held_out: int | None = None,
    rules: Sequence[str] | None = None,
) -> Manifest:
    """Create a folder of shards from existing folders of shards.

    Args:
        folders: Folders of shards with the same number of views per object and the same camera preset.
        out: Output folder.
        resolution: Width and height of the views in pixels. If None, the views are not resized.
        shard_size: Number of objects per shard. If None, shards have a size of up to about 256 MB.
        held_out: Number of objects to select for the validation split. If None, the splits do not change.
        rules: Rules (see ``measures.parse_rule``) that all objects, including rejected objects, must satisfy to be
            copied. If None, all objects that are not rejected are copied.

    Returns:
        The manifest of the output folder.

    Raises:
        InputError: ``out`` exists, folders are incompatible, two objects have the same id, ``resolution`` is larger
            than a view, no object satisfies the rules, or a shard is damaged.
    """
    manifests = {folder: read_manifest(folder) for folder in folders}
    first = manifests[folders[0]]
    _require_compatible(manifests, resolution)
    _require_undamaged(manifests)
    samples = _samples(manifests, rules)
    total = sum(shard.samples for manifest in manifests.values() for shard in manifest.shards)
    if not samples:
        raise RepackError(
            expected=f"objects that satisfy {' and '.join(rules)}"
            if rules
            else "objects that were not rejected",
            found=f"none among {counted(total, 'object')}",
        )
    shard_size = shard_size or default_shard_size(
        max(sum(size for _, size in found.members.values()) for found in samples.values())
    )
    splits = {key: "" if held_out is not None else found.shard.split for key, found in samples.items()}
    plan = plan_shards(splits, held_out or 0, shard_size)
    with new_folder(out) as folder:
        make = partial(_encode, views=first.views, resolution=resolution)
        shards, _, sizes = write_shards(folder, plan, samples, make)
        if len(sizes) > 1:
            differences = ", ".join(f"{size} in {keys[0]!r}" for size, keys in sizes.items())
            raise RepackError(
                expected="views of the same size", found=differences, remedy="use --res N to resize all views"
            )
        # Settings that differ between folders, such as seeds, are omitted.
        render = {
            name: value
            for name, value in first.render.items()
            if all(manifest.render.get(name) == value for manifest in manifests.values())
        }
        render |= {
            "shard_size": shard_size,
            "held_out": sum(len(planned.ids) for planned in plan if planned.split == "val"),
            "repacked_from": [str(source) for source in folders],
        }
        if resolution is not None:
            render["resolution"] = resolution
        if rules is not None:
            render["rules"] = list(rules)
        failures = {
            key: record
            for source in folders
            for key, record in read_failures(source).items()
            if key not in samples
        }
        write_failures(folder / FAILURES_NAME, failures)
        manifest = Manifest(shards=shards, views=first.views, failures=len(failures), render=render)
        write_contact_sheet(folder, manifest.shards, manifest.views)
        write_manifest(folder, manifest)
    skipped = f", {total - len(samples)} skipped" if len(samples) < total else ""
    print(f"{counted(len(samples), 'object')} in {counted(len(shards), 'shard')}{skipped}")
    print(f"next           make train DATA={shlex.quote(str(out))}")
    return manifest


def _require_compatible(manifests: Mapping[Path, Manifest], resolution: int | None) -> None:
    """Check that folders can be merged.

    Raises:
        RepackError: The folders differ in the number of views, scale, cameras, optional members or resolution.
    """
    records = {
        folder: _CAMERAS | _GEOMETRY | manifest.render | {"views": manifest.views}
        for folder, manifest in manifests.items()
    }
    for name in ("views", "normalize", *_CAMERAS, *_GEOMETRY, "resolution"):
        values = [record.get(name) for record in records.values()]
        if values.count(values[0]) == len(values) or (name == "resolution" and resolution):
            continue
        remedy = _MERGE_REMEDY
        if name == "resolution":
            remedy = f"use --res {min(filter(None, values), default='N')} to resize all views"
        raise RepackError(
            expected=f"folders with the same {name}",
            found=", ".join(f"{value} in {folder}" for folder, value in zip(records, values, strict=True)),
            remedy=remedy,
        )


def _require_undamaged(manifests: Mapping[Path, Manifest]) -> None:
    """Check that the hashes of all shards match the manifests, and that the tar headers match the indices.

    Raises:
        ShardError: A shard is damaged.
    """
    shards = [(folder, shard) for folder, manifest in manifests.items() for shard in manifest.shards]
    with processes() as pool:
        differences = pool.map(_first_difference, *zip(*shards, strict=True))
        for (folder, shard), difference in zip(shards, differences, strict=True):
            if difference:
                raise ShardError(
                    subject=folder / shard.name,
                    expected=difference,
                    remedy=f"run `python -m data_tools validate --shards {folder}` to list all damaged shards",
                )


def _first_difference(folder: Path, shard: Shard) -> str:
    return next(find_file_problems(folder, shard), "")


def _samples(manifests: Mapping[Path, Manifest], rules: Sequence[str] | None) -> dict[str, SampleSource]:
    samples: dict[str, SampleSource] = {}
    parsed = None if rules is None else [parse_rule(rule) for rule in rules]
    for folder, manifest in manifests.items():
        for shard in manifest.shards:
            index = read_index(folder, shard)
            for key in _chosen(folder, shard, list(index), parsed):
                if key in samples:
                    raise RepackError(
                        expected="objects with different ids",
                        found=f"{key!r} in {samples[key].folder} and in {folder}",
                        remedy=_MERGE_REMEDY,
                    )
                samples[key] = SampleSource(folder, shard, index[key])
    return samples


def _chosen(folder: Path, shard: Shard, keys: list[str], rules: Sequence[Rule] | None) -> list[str]:
    """Return the keys of objects that satisfy the rules, or of objects that are not rejected if ``rules`` is None."""
    if rules is None:
        return [] if shard.rejected else keys
    measured = dict(read_measures(folder, shard))
    if unknown := [key for key in keys if key not in measured]:
        raise RepackError(
            subject=folder / shard.name,
            expected="measures of all objects",
            found=f"no measures of {unknown[0]!r}",
            remedy="use --where only with folders that `render` has written",
        )
    return [key for key in keys if not broken_rules(measured[key], rules)]


def _encode(key: str, found: SampleSource, views: int, resolution: int | None) -> EncodedSample:
    """Read, check and resize a sample. Members that the schema does not define are copied unchanged."""
    path = found.folder / found.shard.name
    try:
        members = dict(zip(found.members, read_members(path, found.members.values()), strict=True))
        sample = decode_sample(key, members)
        if sample.info.views != views:
            raise SampleError(
                subject=f"sample {key!r}",
                expected=f"{views} views as in the manifest",
                found=sample.info.views,
            )
        if resolution is not None:
            smaller = tuple(resized(key, view, resolution) for view in sample.views)
            sample = dataclasses.replace(sample, views=smaller, extras=resize_geometry(sample, smaller))
        encoded = encode_sample(sample)
        height, width, _ = decode_image(key, sample.views[0]).shape
    except SampleError as error:
        raise ShardError(f"{path}: {error}") from error
    # Views are excluded, because their names contain the format, which may have changed.
    unknown = {name for name in members if name not in encoded and not VIEW_PATTERN.fullmatch(name)}
    kept = {name: members[name] for name in sorted(unknown)}
    return EncodedSample(encoded | kept, notes=(f"{width} x {height} pixels",))


def resized(key: str, view: bytes, resolution: int) -> bytes:
    """Downsample a square view with premultiplied alpha. A view with the requested resolution is returned unchanged.

    Args:
        key: Key of the sample, for error messages.
        view: Encoded view.
        resolution: Width and height in pixels.

    Returns:
        The encoded view.

    Raises:
        RepackError: The view is smaller than ``resolution``.
    """
    rgba = decode_image(key, view)
    if rgba.shape[:2] == (resolution, resolution):
        return view
    if min(rgba.shape[:2]) < resolution:
        raise RepackError(
            subject=f"sample {key!r}",
            expected=f"views of at least {resolution} x {resolution} pixels",
            found=f"{rgba.shape[1]} x {rgba.shape[0]} pixels",
            remedy="use a smaller --res or render larger views",
        )
    small = Image.fromarray(rgba).convert("RGBa").resize((resolution, resolution), Image.Resampling.BOX)
    return encode_image(np.array(small.convert("RGBA"), dtype=np.uint8))
