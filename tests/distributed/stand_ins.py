"""Callbacks that hang or kill a run at a chosen step."""

import os
import signal
import time

import lightning as L


class HangInTrainingStep(L.Callback):
    """Make one rank sleep forever in a training step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            pl_module.training_step = sleep_for_ever


def sleep_for_ever(*arguments):
    while True:
        time.sleep(1)


class KillAfterStep(L.Callback):
    """Kill the process with SIGKILL after a step and before its log line."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
