"""Assignment of objects to splits and shards: pure functions of the list of ids.

The assignment does not depend on how rendering proceeds. An object that fails leaves a gap in its shard.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence

from lrm_pl.data.manifest import Split
from lrm_pl.data.surface import SURFACE_POINTS
from lrm_pl.errors import InputError, counted

#: Default size of the validation split: one sixth of the objects, but at most this many.
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


#: Target size of a shard, bytes.
SHARD_BYTES = 256 * 10**6


def estimate_object_bytes(
    views: int, resolution: int, *, depth: bool = False, normals: bool = False, surface: bool = False
) -> int:
    """Return an upper estimate of the size of a sample: 2 bytes per pixel, and headers.

    Depth adds 2 bytes per pixel, normals 3, and a surface 24 bytes per point.
    """
    view = (2 + 2 * depth + 3 * normals) * resolution**2 + 4096
    return views * view + surface * SURFACE_POINTS * 24


def default_shard_size(object_bytes: float) -> int:
    """Return the number of objects per shard of about ``SHARD_BYTES``."""
    return max(1, int(SHARD_BYTES / object_bytes))


def default_held_out(splits: Collection[str]) -> int:
    """Return the default number of held-out objects; 0 if the asset list defines a validation split."""
    return 0 if "val" in splits else min(DEFAULT_HELD_OUT, len(splits) // 6)


def held_out_ids(ids: Sequence[str], held_out: int) -> set[str]:
    """Select the ids with the ``held_out`` smallest sha256 hashes as the validation split."""
    return set(sorted(ids, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:held_out])


def plan_shards(splits: Mapping[str, str], held_out: int, shard_size: int) -> tuple[PlannedShard, ...]:
    """Assign the objects of each split, in order of their ids, to shards.

    Args:
        splits: Mapping of id to "train", "val" or "" (unassigned).
        held_out: Number of unassigned objects to hold out.
        shard_size: Objects per shard.

    Raises:
        InputError: No objects would remain for training, or ``shard_size`` is not positive.
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
    """Assign ids to shards of ``shard_size`` objects, in order.

    Args:
        members: Mapping of split to ids.
        shard_size: Objects per shard.
        first: Mapping of split to the number of its first shard; 0 by default.

    Raises:
        InputError: ``shard_size`` is not positive.
    """
    if shard_size < 1:
        raise InputError(expected="a --shard-size of at least 1", found=shard_size)
    numbers = first or dict.fromkeys(members, 0)
    return tuple(
        PlannedShard(
            f"{split}-{numbers[split] + start // shard_size:06d}.tar",
            split,
            tuple(keys[start : start + shard_size]),
        )
        for split, keys in members.items()
        for start in range(0, len(keys), shard_size)
    )
