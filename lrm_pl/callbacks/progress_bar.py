"""The progress bar: loss and speed of the last logged step."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from lrm_pl.training.logged import is_logged

#: Logged values that are shown.
SHOWN = ("loss/total", "speed/samples_per_second")


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, without a wait for the device at steps that are not logged.

    Lightning reads each value that is logged with ``prog_bar=True`` from the device at every step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:  # noqa: ANN401 - Lightning's signature
        """Count optimizer steps: a run has no epochs that Lightning knows of."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("Training")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Read what was logged, where something was."""
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if ends_step and is_logged(trainer, trainer.global_step):
            logged = trainer.callback_metrics
            self._shown = {name: float(logged[name]) for name in SHOWN if name in logged}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Add them to what Lightning shows."""
        return super().get_metrics(trainer, pl_module) | self._shown
