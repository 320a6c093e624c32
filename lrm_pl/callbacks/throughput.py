"""What the hardware does: samples a second, memory."""

import resource
import sys
import time
from typing import Any

import lightning as L
import torch

from lrm_pl.data.batch import Batch


class ThroughputLogger(L.Callback):
    """Log ``speed/samples_per_second`` and ``memory/*_gib`` at the trainer's logging steps."""

    def __init__(self) -> None:
        self._samples, self._since = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._samples, self._since = 0, time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock: validation is not training."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again."""
        self._since += time.perf_counter() - self._paused

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Log speed and memory."""
        self._samples += len(batch.ids) * trainer.world_size
        step_done = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not step_done or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now = time.perf_counter()
        rate, self._samples, self._since = self._samples / max(now - self._since, 1e-9), 0, now
        pl_module.log("speed/samples_per_second", rate, prog_bar=True)
        unit = 1024**3 if sys.platform == "darwin" else 1024**2  # ru_maxrss counts bytes there, KiB elsewhere
        pl_module.log("memory/peak_host_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
        if pl_module.device.type == "cuda":
            pl_module.log("memory/peak_gpu_gib", torch.cuda.max_memory_allocated(pl_module.device) / 1024**3)
