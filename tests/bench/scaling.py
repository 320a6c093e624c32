"""Samples per second of two processes with one thread, relative to one process with two threads.

`python -m tests.bench.scaling SHARDS STEPS PROCESSES` runs one process of either side.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch

from tests.bench.demo_run import build, fit_on_cached_batches, launch_processes

TARGET = 0.9
SKIPPED = 5  # warm-up steps


class StepTimes(L.Callback):
    """Record the end time of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())


def measure(shards: Path, rounds: int, steps: int = 25) -> dict[str, object]:
    """Run the two sides alternately; the rate of a run is that of its median step."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for processes in (1, 2):
            printed = launch_processes(
                processes, 2 // processes, "tests.bench.scaling", str(shards), str(steps), str(processes)
            )
            lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
            rates[processes].append(lines[0]["samples_per_second"])
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    ratio = statistics.median(b / a for a, b in zip(rates[1], rates[2], strict=True))
    return {
        "bench": "training speed of two processes with one thread each, relative to one process with two threads",
        "value": ratio,
        "target": f">= {TARGET}",
        "met": ratio >= TARGET,
        "samples_per_second": {"1x2": one, "2x1": two},
        "rounds": rates,
    }


def one_side(shards: Path, steps: int, processes: int) -> None:
    """Train and print the samples per second."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        strategy = ["-c", "configs/trainer/ddp.yaml"] if processes > 1 else []
        cli = build(
            shards, Path(folder), *strategy, "--trainer.accelerator", "cpu", "--trainer.devices", str(processes),
            "--trainer.max_steps", str(steps + SKIPPED), "--trainer.enable_progress_bar", "false",
            "--trainer.callbacks", "[]",
        )  # fmt: skip
        fit_on_cached_batches(cli, times)
    ends = times.ends[SKIPPED - 1 :]
    step = statistics.median(b - a for a, b in itertools.pairwise(ends))
    if cli.trainer.is_global_zero:
        rate = cli.datamodule.batch_size / step
        print(json.dumps({"samples_per_second": rate, "threads": torch.get_num_threads()}), flush=True)


if __name__ == "__main__":
    one_side(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
