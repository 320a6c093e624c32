"""Overhead of the framework: a Trainer step with all callbacks and logging, minus the step of a bare loop."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lrm_pl.data.batch import Batch
from tests.bench.demo_run import build, fit_on_cached_batches

TARGET = 0.03
BLOCK = 10  # steps of each side per round; the Trainer logs once in ten steps


class BareLoop(L.Callback):
    """After every ten steps of the Trainer, run ten steps without it on the same batches."""

    def __init__(self) -> None:
        #: (wall seconds, CPU seconds of all threads) per step of each round; CPU time ignores other programs.
        self.trainers: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self._batches: list[Batch] = []
        self._began = _now()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = _now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._batches.append(batch)
        if len(self._batches) < BLOCK:
            return
        middle = _now()
        for kept in self._batches:
            self._step(trainer, pl_module, kept)
        end = _now()
        self.trainers.append(_per_step(self._began, middle))
        self.bare.append(_per_step(middle, end))
        self._batches, self._began = [], _now()

    def _step(self, trainer: L.Trainer, module: Any, batch: Batch) -> None:
        optimizer = trainer.optimizers[0]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(module.objective(module.render_targets(batch), 0).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in module.lrm.parameters() if p.requires_grad], 1.0)
        type(optimizer).step(optimizer)


def measure(shards: Path, rounds: int) -> dict[str, object]:
    """Return the median over rounds of the overhead as a fraction of a step."""
    sides = BareLoop()
    with tempfile.TemporaryDirectory() as folder:
        steps = (rounds + 1) * BLOCK
        cli = build(shards, Path(folder), "--trainer.max_steps", str(steps), "--trainer.accelerator", "cpu")
        fit_on_cached_batches(cli, sides)
    trainers, bare = sides.trainers[1:], sides.bare[1:]
    share, processor_share = (
        statistics.median((a[clock] - b[clock]) / a[clock] for a, b in zip(trainers, bare, strict=True))
        for clock in (0, 1)
    )
    return {
        "bench": "overhead of the framework, as a fraction of the step duration",
        "value": share,
        "target": f"< {TARGET}",
        "met": share < TARGET,
        "share_of_processor_time": processor_share,
        "step_ms": {
            "trainer": 1000 * statistics.median(wall for wall, _ in trainers),
            "bare": 1000 * statistics.median(wall for wall, _ in bare),
        },
        "rounds": {"trainer": trainers, "bare": bare},
    }


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _per_step(began: tuple[float, float], ended: tuple[float, float]) -> tuple[float, float]:
    return (ended[0] - began[0]) / BLOCK, (ended[1] - began[1]) / BLOCK
