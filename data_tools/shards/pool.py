"""Shards made by a pool of processes out of what is there already."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from data_tools.rendering.shard_plan import PlannedShard
from lrm_pl.data.manifest import Shard
from lrm_pl.data.tar import write_shard
from lrm_pl.errors import InputError
from lrm_pl.orphans import end_with_parent

Task = TypeVar("Task")


@dataclasses.dataclass(frozen=True)
class Made:
    """A sample.

    Attributes:
        members: As ``schema.encode_sample`` gives them.
        notes: What is to be said of it.
    """

    members: dict[str, bytes]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What takes the place of an object that cannot be used.

    Attributes:
        reason: Why.
    """

    reason: str


@contextmanager
def processes(count: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Start a pool of processes, which end with this one; what waits is dropped where the block fails.

    Args:
        count: Number of processes; None takes as many as there are cores.

    Raises:
        InputError: The number is not positive, or a process was killed.
    """
    if count is not None and count < 1:
        raise InputError(expected="--jobs of at least 1", found=count)
    with ProcessPoolExecutor(count or len(os.sched_getaffinity(0)), initializer=end_with_parent) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise InputError(
                expected="processes that run to their end",
                found="that one was killed, most often for lack of memory",
                remedy="run the command again on fewer cores: `taskset -c 0` before it",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_shards(
    folder: Path,
    plan: Sequence[PlannedShard],
    tasks: Mapping[str, Task],
    make: Callable[[str, Task], Made | LeftOut],
) -> tuple[tuple[Shard, ...], dict[str, LeftOut], dict[str, list[str]]]:
    """Make all samples, in as many processes as there are cores, and write their shards.

    An object that is left out leaves a hole in its shard and moves nothing else; a shard of nothing but holes is not
    written.

    Args:
        folder: Where to.
        plan: The shards.
        tasks: What ``make`` is given besides the id, for every id of the plan.
        make: Makes a sample, in another process; what it raises ends the whole.

    Returns:
        The shards, the objects left out, and note -> ids.

    Raises:
        InputError: A process was killed.
    """
    shards: list[Shard] = []
    left_out: dict[str, LeftOut] = {}
    notes: dict[str, list[str]] = {}

    def kept(made: Iterator[tuple[str, Made | LeftOut]]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for key, sample in made:
            bar.update()
            if isinstance(sample, LeftOut):
                left_out[key] = sample
            else:
                for note in sample.notes:
                    notes.setdefault(note, []).append(key)
                yield key, sample.members

    with tqdm(total=len(tasks), unit="object", file=sys.stderr) as bar, processes() as pool:
        for planned in plan:
            made = pool.map(make, planned.ids, [tasks[key] for key in planned.ids])
            samples = kept(zip(planned.ids, made, strict=True))
            first = next(samples, None)
            if first is not None:
                shards.append(write_shard(folder, planned.name, planned.split, chain([first], samples)))
    return tuple(shards), left_out, notes
