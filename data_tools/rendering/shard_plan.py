"""Decide which split and which shard an object belongs to: pure functions of the list of ids.

Nothing here depends on how rendering goes, so a failure leaves a hole in its shard and moves nothing else.
"""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence

from lrm_pl.data.manifest import Split
from lrm_pl.errors import InputError

#: At most this many objects are held out unless the user says otherwise, and never more than a sixth.
DEFAULT_HELD_OUT = 8


@dataclasses.dataclass(frozen=True)
class PlannedShard:
    """One shard before anything is rendered.

    Attributes:
        name: File name, ``train-000000.tar``.
        split: Its split.
        ids: The objects that belong in it, in order.
    """

    name: str
    split: Split
    ids: tuple[str, ...]


def default_held_out(splits: Collection[str]) -> int:
    """Say how many objects are held out when nobody asked for a number: none where the list holds out some."""
    return 0 if "val" in splits else min(DEFAULT_HELD_OUT, len(splits) // 6)


def held_out_ids(ids: Sequence[str], held_out: int) -> set[str]:
    """Choose the validation split: the ``held_out`` ids whose sha256 (hex, of UTF-8) is smallest."""
    return set(sorted(ids, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[:held_out])


def plan_shards(splits: Mapping[str, str], held_out: int, shard_size: int) -> tuple[PlannedShard, ...]:
    """Cut each split, in order of id, into shards of ``shard_size`` objects.

    Args:
        splits: Id -> "train", "val", or "" where nobody said.
        held_out: How many of those that nobody assigned are held out.
        shard_size: Objects a shard.

    Raises:
        InputError: ``held_out`` leaves nothing to train on, or ``shard_size`` is not positive.
    """
    free = [key for key, split in splits.items() if not split]
    val = {key for key, split in splits.items() if split == "val"}
    most = len(free) - (0 if "train" in splits.values() else 1)
    if held_out and not 0 <= held_out <= most:
        raise InputError(
            expected=(
                f"--held-out between 0 and {max(0, most)} ({len(free)} assets to choose from, one at "
                "least trains)"
            ),
            found=held_out,
        )
    val |= held_out_ids(free, held_out)
    return split_into_shards({"train": sorted(set(splits) - val), "val": sorted(val)}, shard_size)


def split_into_shards(
    members: Mapping[Split, Sequence[str]], shard_size: int, first: Mapping[Split, int] | None = None
) -> tuple[PlannedShard, ...]:
    """Cut the ids of each split, in their order, into shards of ``shard_size`` objects.

    Args:
        members: Split -> ids.
        shard_size: Objects a shard.
        first: Split -> number of its first shard; 0 unless given.

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
