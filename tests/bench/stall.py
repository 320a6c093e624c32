"""Stall of training by a checkpoint: the longest step around a save, minus the median step."""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

from tests.bench.demo_run import build, fit_on_cached_batches

TARGET = 1.0
EVERY = 12


class Steps(L.Callback):
    """Record the end time of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def measure(shards: Path, rounds: int) -> dict[str, object]:
    """Save ``rounds`` checkpoints. A save starts with a step and is written during this step and the next ones."""
    times = Steps()
    keeper = {
        "class_path": "lrm_pl.training.checkpointing.CheckpointAndResume",
        "init_args": {"every": EVERY, "monitor": None, "background": True},
    }
    with tempfile.TemporaryDirectory() as folder:
        cli = build(
            shards, Path(folder), "--trainer.max_steps", str((rounds + 1) * EVERY), "--trainer.accelerator", "cpu",
            "--trainer.callbacks", json.dumps([keeper]),
        )  # fmt: skip
        fit_on_cached_batches(cli, times)
    steps = [b - a for a, b in itertools.pairwise(times.ends)]  # steps[i] is step i + 2
    median = statistics.median(steps)
    stalls = []
    for saved in range(EVERY, rounds * EVERY + 1, EVERY):
        around = steps[saved - 1 : saved + 3]  # the step that begins with the save, and three more
        stalls.append((max(around) - median) / median)
    quiet = [step for i, step in enumerate(steps) if (i + 1) % EVERY > 4]
    stall = statistics.median(stalls)
    return {
        "bench": "training delay caused by saving a checkpoint, in step durations",
        "value": stall,
        "target": f"< {TARGET}",
        "met": stall < TARGET,
        "step_ms": 1000 * median,
        "longest_step_without_a_save": max(quiet) / median - 1,
        "rounds": stalls,
    }
