"""Pool of processes that encode samples, and a function that writes the samples to shards."""

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
class EncodedSample:
    """An encoded sample.

    Attributes:
        members: Members of the sample, from ``schema.encode_sample``.
        notes: Notes about the sample, which ``write_shards`` collects.
    """

    members: dict[str, bytes]
    notes: tuple[str, ...] = ()


@contextmanager
def processes(count: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Start a process pool. The processes exit when the parent process ends.

    If the block raises an exception, pending tasks are canceled.

    Args:
        count: Number of processes. If None, the number of available CPU cores is used.

    Raises:
        InputError: A process was killed.
    """
    with ProcessPoolExecutor(count or len(os.sched_getaffinity(0)), initializer=end_with_parent) as pool:
        try:
            yield pool
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed, probably because the machine ran out of memory",
                remedy="run the command on fewer CPU cores, for example with the prefix `taskset -c 0`",
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def write_shards(
    folder: Path,
    plan: Sequence[PlannedShard],
    tasks: Mapping[str, Task],
    make: Callable[[str, Task], EncodedSample | str],
) -> tuple[tuple[Shard, ...], dict[str, str], dict[str, list[str]]]:
    """Encode all samples with one process per CPU core, and write the shards.

    If an object is skipped, the assignment of all other objects does not change. Empty shards are not written.

    Args:
        folder: Output folder.
        plan: Shards to write.
        tasks: Mapping from the ids in the plan to the second argument of ``make``.
        make: Function that encodes a sample in a worker process. If the object cannot be used, it returns the reason.
            Exceptions of this function are propagated.

    Returns:
        The shards, a mapping from the ids of skipped objects to reasons, and a mapping from notes to ids.

    Raises:
        InputError: A process was killed.
    """
    shards: list[Shard] = []
    skipped: dict[str, str] = {}
    notes: dict[str, list[str]] = {}

    def encode(planned: PlannedShard) -> Iterator[tuple[str, dict[str, bytes]]]:
        made = pool.map(make, planned.ids, [tasks[key] for key in planned.ids])
        for key, sample in zip(planned.ids, made, strict=True):
            bar.update()
            if isinstance(sample, str):
                skipped[key] = sample
                continue
            for note in sample.notes:
                notes.setdefault(note, []).append(key)
            yield key, sample.members

    with tqdm(total=len(tasks), unit="object", file=sys.stderr) as bar, processes() as pool:
        for planned in plan:
            samples = encode(planned)
            first = next(samples, None)
            if first is not None:
                shards.append(write_shard(folder, planned.name, planned.split, chain([first], samples)))
    return tuple(shards), skipped, notes
