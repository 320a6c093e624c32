"""Callbacks that inject faults into a run."""

import lightning as L
import torch


class Poison(L.Callback):
    """Set an image of one rank to NaN at some steps."""

    def __init__(self, rank: int = 1, first: int = 3, last: int = 3) -> None:
        self.rank, self.first, self.last = rank, first, last

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and self.first <= trainer.global_step <= self.last:
            batch.target.images[0, 0] = float("nan")


class RunOut(L.Callback):
    """Raise an out-of-memory error on every rank at one step."""

    def __init__(self, step: int = 1) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise torch.OutOfMemoryError("1 GB short")
