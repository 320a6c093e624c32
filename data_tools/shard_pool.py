"""Shards made by a pool of processes out of what is there already."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from data_tools.plan import PlannedShard
from lrm_pl.data.manifest import Shard, write_shard

Task = TypeVar("Task")

#: A sample as ``schema.encode_sample`` gives it.
Members = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What is put in the place of an object that cannot be used.

    Attributes:
        reason: Why.
    """

    reason: str


def write_shards(
    folder: Path,
    plan: Sequence[PlannedShard],
    tasks: Mapping[str, Task],
    make: Callable[[str, Task], Members | LeftOut],
) -> tuple[tuple[Shard, ...], dict[str, LeftOut]]:
    """Make all samples, in as many processes as there are cores, and write their shards.

    An object that is left out leaves a hole in its shard and moves nothing else; a shard of nothing but holes is not
    written.

    Args:
        folder: Where to.
        plan: The shards.
        tasks: What ``make`` is given besides the id, for every id of the plan.
        make: Makes a sample, in another process; what it raises ends the whole.

    Returns:
        The shards, and the objects left out.
    """
    shards: list[Shard] = []
    left_out: dict[str, LeftOut] = {}
    with (
        tqdm(total=len(tasks), unit="object", file=sys.stderr) as bar,
        ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        for planned in plan:
            made = pool.map(make, planned.ids, [tasks[key] for key in planned.ids])
            samples = _kept(zip(planned.ids, made, strict=True), left_out, bar)
            first = next(samples, None)
            if first is not None:
                shards.append(write_shard(folder, planned.name, planned.split, chain([first], samples)))
    return tuple(shards), left_out


def _kept(
    made: Iterator[tuple[str, Members | LeftOut]], left_out: dict[str, LeftOut], bar: tqdm
) -> Iterator[tuple[str, Members]]:
    for key, sample in made:
        bar.update()
        if isinstance(sample, LeftOut):
            left_out[key] = sample
        else:
            yield key, sample
