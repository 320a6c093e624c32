"""``python -m data_tools repack``: folders of shards made into another one, without rendering.

Another resolution, shard size or split, several folders joined to one, or a part of them. Images that keep their size
keep their bytes. The new folder appears under its name when it is whole.
"""

import dataclasses
import itertools
import shlex
import tarfile
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
from data_tools.rendering.shard_plan import default_shard_size, held_out_ids, split_into_shards
from data_tools.shards.pool import Made, processes, write_shards
from lrm_pl.data.manifest import (
    SPLITS,
    Manifest,
    Shard,
    ShardError,
    Split,
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

#: What a manifest says of the cameras of all its objects, where they were rendered here.
_CAMERAS = dict.fromkeys(("preset", "radius_range", "height_range", "fov_range_deg"))

#: What lies beside the views of all objects; older manifests do not say.
_GEOMETRY = dict.fromkeys(("depth", "normals", "surface"), False)


class RepackError(InputError):
    """Folders do not go together, or not into what was asked for."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a sample lies now.

    Attributes:
        folder: Its folder.
        shard: Its shard.
        members: Member -> (offset, size).
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
    """Make one folder of shards out of others.

    Args:
        folders: Folders of shards with equally many views an object, by cameras of one preset.
        out: The folder to make.
        resolution: Side of the images; None leaves them as they are.
        shard_size: Objects per shard; None: shards of at most about 256 MB.
        held_out: Objects in the validation split, chosen anew; None leaves every object in its split.
        rules: What an object must obey (``criteria.parse_rule``), those that were rejected before too; None leaves out
            just these.

    Raises:
        InputError: ``out`` is there, folders differ in views, size, scale, cameras or geometry, two objects have one
            name, images would become larger, nothing obeys, or a shard is damaged.
    """
    manifests = {folder: read_manifest(folder) for folder in folders}
    first = manifests[folders[0]]
    _require_one_kind(manifests, resolution)
    _require_whole(manifests)
    samples = _samples(manifests, rules)
    total = sum(shard.samples for manifest in manifests.values() for shard in manifest.shards)
    if not samples:
        raise RepackError(expected=f"objects that obey {' and '.join(rules or ())}", found=f"none of {total}")
    shard_size = shard_size or default_shard_size(
        max(sum(size for _, size in found.members.values()) for found in samples.values())
    )
    plan = split_into_shards(_splits(samples, held_out), shard_size)
    with new_folder(out) as folder:
        make = partial(_members, views=first.views, resolution=resolution)
        shards, _, sizes = write_shards(folder, plan, samples, make)
        if len(sizes) > 1:
            told = ", ".join(f"{size} in {keys[0]!r}" for size, keys in sizes.items())
            raise RepackError(expected="views of one size", found=told, remedy="--res N makes them alike")
        # What folders may differ in, such as seeds, is said of the new one only where they agree.
        records = [manifest.render for manifest in manifests.values()]
        agreed = {
            name: value
            for name, value in first.render.items()
            if all(name in record and record[name] == value for record in records)
        }
        render = agreed | {
            "shard_size": shard_size,
            "held_out": sum(len(s.ids) for s in plan if s.split == "val"),
        }
        render |= {"repacked_from": [str(source) for source in folders]}
        render |= {"resolution": resolution} if resolution is not None else {}
        render |= {"rules": list(rules)} if rules is not None else {}
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
    left_out = f", {total - len(samples)} left out" if len(samples) < total else ""
    print(f"{counted(len(samples), 'object')} in {counted(len(shards), 'shard')}{left_out}")
    print(f"next           make train DATA={shlex.quote(str(out))}")
    return manifest


def _require_one_kind(manifests: Mapping[Path, Manifest], resolution: int | None) -> None:
    """Refuse folders of which one manifest cannot tell the truth.

    Raises:
        RepackError: They differ in views, scale, cameras, geometry or, unless it becomes one, resolution.
    """
    records = {
        folder: _CAMERAS | _GEOMETRY | manifest.render | {"views": manifest.views}
        for folder, manifest in manifests.items()
    }
    for name in ("views", "normalize", *_CAMERAS, *_GEOMETRY, "resolution"):
        found = {folder: record.get(name) for folder, record in records.items()}
        if all(value == found[folder] for folder in found for value in found.values()):
            continue
        if name != "resolution":
            remedy = _both_as_they_are(manifests)
        elif resolution:
            continue
        else:
            remedy = f"--res {min((size for size in found.values() if size), default='N')} makes them alike"
        told = ", ".join(f"{value} in {folder}" for folder, value in found.items())
        raise RepackError(expected="folders of one kind", found=f"{name}: {told}", remedy=remedy)


def _require_whole(manifests: Mapping[Path, Manifest]) -> None:
    """Refuse shards that are not the bytes that were made: the new folder's hashes would vouch for them.

    Raises:
        ShardError: With the first difference.
    """
    shards = [(folder, shard) for folder, manifest in manifests.items() for shard in manifest.shards]
    with processes() as pool:
        for (folder, shard), difference in zip(
            shards, pool.map(_first_difference, *zip(*shards, strict=True)), strict=True
        ):
            if difference:
                raise ShardError(
                    f"{folder / shard.name}: {difference}; `python -m data_tools validate --shards {folder}` names all "
                    "that is damaged"
                )


def _first_difference(folder: Path, shard: Shard) -> str:
    try:
        return next(find_file_problems(folder, shard), "")
    except tarfile.TarError as error:
        return f"expected a tar, but found {error}"


def _both_as_they_are(manifests: Mapping[Path, Manifest]) -> str:
    """Say what to do with folders that cannot be joined: training on them must not show what one of them holds out."""
    ids = {
        (folder, split): {key for shard in manifest.split(split) for key in read_index(folder, shard)}
        for folder, manifest in manifests.items()
        for split in SPLITS
    }
    for held_out, trained in itertools.permutations(manifests, 2):
        leaked = sorted(ids[held_out, "val"] & ids[trained, "train"])
        if leaked:
            return (
                f"leave one of them out: {leaked[0]!r} is held out in {held_out} and trained on in {trained}"
            )
    return "train on both as they are: --data.also"


def _samples(manifests: Mapping[Path, Manifest], rules: Sequence[str] | None) -> dict[str, Found]:
    samples: dict[str, Found] = {}
    parsed = None if rules is None else [parse_rule(rule) for rule in rules]
    for folder, manifest in manifests.items():
        for shard in manifest.shards:
            chosen = _chosen(folder, shard, parsed)
            for key, members in read_index(folder, shard).items():
                if key not in chosen:
                    continue
                if key in samples:
                    raise RepackError(
                        expected="every name once",
                        found=f"{key!r} in {samples[key].folder} and in {folder}",
                        remedy=_both_as_they_are(manifests),
                    )
                samples[key] = Found(folder, shard, members)
    return samples


def _chosen(folder: Path, shard: Shard, rules: Sequence[Rule] | None) -> set[str]:
    """Name the objects of a shard that obey; without rules those that none rejected before."""
    keys = set(read_index(folder, shard))
    if rules is None:
        return set() if shard.rejected else keys
    measured = dict(read_measures(folder, shard))
    if unknown := sorted(keys - set(measured)):
        raise RepackError(
            subject=folder / shard.name,
            expected="measures of every object",
            found=f"none of {unknown[0]!r}",
            remedy="rules need a folder that `render` made",
        )
    return {key for key, measures in measured.items() if not broken_rules(measures, rules)}


def _splits(samples: Mapping[str, Found], held_out: int | None) -> dict[Split, list[str]]:
    if held_out is None:
        val = {key for key, found in samples.items() if found.shard.split == "val"}
    elif held_out < len(samples):
        val = held_out_ids(list(samples), held_out)
    else:
        raise RepackError(expected=f"--held-out below {len(samples)}, the number of objects", found=held_out)
    return {"train": sorted(set(samples) - val), "val": sorted(val)}


def _members(key: str, found: Found, views: int, resolution: int | None) -> Made:
    """Read a sample, check it, and give it its new size; members that the schema does not know stay as they are."""
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
    # A view is named by its format, which may be another one now.
    unknown = {name for name in members if name not in encoded and not VIEW_PATTERN.fullmatch(name)}
    kept = {name: members[name] for name in sorted(unknown)}
    return Made(encoded | kept, notes=(f"{width} x {height} pixels",))


def resized(key: str, view: bytes, resolution: int) -> bytes:
    """Make an image smaller; one of this size keeps its bytes.

    Colors are weighted by their alpha, so that nothing bleeds in from where nothing is. Normalized intrinsics stay
    true.

    Raises:
        RepackError: The image is smaller.
    """
    rgba = decode_image(key, view)
    if rgba.shape[:2] == (resolution, resolution):
        return view
    if min(rgba.shape[:2]) < resolution:
        raise RepackError(
            subject=f"sample {key!r}",
            expected=f"views of at least {resolution} pixels a side",
            found=rgba.shape[:2],
            remedy="larger ones must be rendered",
        )
    small = Image.fromarray(rgba).convert("RGBa").resize((resolution, resolution), Image.Resampling.BOX)
    return encode_image(np.array(small.convert("RGBA"), dtype=np.uint8))
