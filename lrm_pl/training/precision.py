"""What the trainer's precision means on GPUs."""

import contextlib

import lightning as L
import torch

from lrm_pl.kernels.device import without_tf32


class Float32Convolutions(L.Callback):
    """Turn TF32 off for as long as a trainer with ``precision: 32-true`` runs.

    PyTorch lets cuDNN use TF32 by default; backward reads the switch too, so that all of the run is covered. Other
    precisions, and products that ``torch.set_float32_matmul_precision`` allows to be rounded, are left alone.
    """

    def __init__(self) -> None:
        self._running = contextlib.ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Turn it off."""
        if trainer.precision == "32-true" and torch.get_float32_matmul_precision() == "highest":
            self._running.enter_context(without_tf32())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore it."""
        self._running.close()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore it: Lightning does not call ``teardown`` then."""
        self._running.close()
