"""Assignment of objects to splits and shards.

The assignment depends only on the ids and the options. If an object fails, the assignment of all other objects does not
change.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence

from lrm_pl.data.manifest import Split
from lrm_pl.data.surface import SURFACE_POINTS
from lrm_pl.errors import InputError, counted

#: Maximum of the default size of the validation split, which is one sixth of the objects.
DEFAULT_HELD_OUT = 8


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """A shard to be written.

    Attributes:
        name: File name, for example ``train-000000.tar``.
        split: Split of the objects.
        ids: Ids of the objects, in order.
    """

    name: str
    split: Split
    ids: tuple[str, ...]


#: Target size of a shard in bytes.
SHARD_BYTES = 256 * 10**6


def estimate_object_bytes(
    views: int, resolution: int, *, depth: bool = False, normals: bool = False, surface: bool = False
) -> int:
    """Return an upper estimate of the size of a sample in bytes.

    The estimate is 2 bytes per pixel plus 4096 bytes per view. Depth maps add 2 bytes per pixel, normal maps 3 bytes
    per pixel, and surface points 24 bytes per point.

    Args:
        views: Number of views.
        resolution: Width and height of the views in pixels.
        depth: Whether the sample contains depth maps.
        normals: Whether the sample contains normal maps.
        surface: Whether the sample contains surface points.
    """
    view = (2 + 2 * depth + 3 * normals) * resolution**2 + 4096
    return views * view + surface * SURFACE_POINTS * 24


def default_shard_size(object_bytes: float) -> int:
    """Return the number of objects in a shard of up to about ``SHARD_BYTES`` bytes."""
    return max(1, int(SHARD_BYTES / object_bytes))


def default_held_out(splits: Collection[str]) -> int:
    """Return the default number of held-out objects. If the asset list defines a validation split, it is 0.

    Args:
        splits: Split of each object, "train", "val" or "" if it is not assigned.
    """
    return 0 if "val" in splits else min(DEFAULT_HELD_OUT, len(splits) // 6)


def held_out_ids(ids: Sequence[str], held_out: int) -> set[str]:
    """Select the ids of the validation split. They are the ``held_out`` ids with the smallest sha256 hashes."""
    return set(sorted(ids, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:held_out])


def plan_shards(splits: Mapping[str, str], held_out: int, shard_size: int) -> tuple[PlannedShard, ...]:
    """Assign the objects of each split to shards, in the order of their ids.

    Args:
        splits: Mapping from ids to "train", "val" or "", where "" means that the split is not assigned.
        held_out: Number of objects without an assigned split to assign to the validation split.
        shard_size: Number of objects per shard.

    Raises:
        InputError: There would be no objects in the training split, or ``shard_size`` is not positive.
    """
    free = [key for key, split in splits.items() if not split]
    val = {key for key, split in splits.items() if split == "val"}
    most = len(free) - (0 if "train" in splits.values() else 1)
    if held_out and not 0 <= held_out <= most:
        raise InputError(
            expected=f"--held-out between 0 and {max(0, most)} for {counted(len(free), 'unassigned asset')}",
            found=held_out,
            remedy="leave at least one asset for training",
        )
    val |= held_out_ids(free, held_out)
    return split_into_shards({"train": sorted(set(splits) - val), "val": sorted(val)}, shard_size)


def split_into_shards(
    members: Mapping[Split, Sequence[str]], shard_size: int, first: Mapping[Split, int] | None = None
) -> tuple[PlannedShard, ...]:
    """Assign ids to shards in order.

    Args:
        members: Mapping from splits to ids.
        shard_size: Number of objects per shard.
        first: Mapping from splits to the number of the first shard, which is 0 by default.

    Raises:
        InputError: ``shard_size`` is not positive.
    """
    if shard_size < 1:
        raise InputError(expected="a --shard-size of at least 1", found=shard_size)
    return tuple(
        PlannedShard(f"{split}-{number:06d}.tar", split, tuple(keys[start : start + shard_size]))
        for split, keys in members.items()
        for number, start in enumerate(range(0, len(keys), shard_size), (first or {}).get(split, 0))
    )
