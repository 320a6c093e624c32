"""Progress bar over optimizer steps, with the loss and throughput of the last logged step."""

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT

from lrm_pl.training.step_logging import is_logged_step

#: Logged metrics that are shown first in the progress bar, and their labels.
SHOWN = {"loss/total": "loss", "speed/samples_per_second": "samples/s"}


class ProgressBar(TQDMProgressBar):
    """Progress bar that does not synchronize with the device between logging steps.

    In contrast, Lightning's progress bar reads the values logged with ``prog_bar=True`` after every batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Count the optimizer steps of the whole run, including the steps completed before the run was resumed."""
        super().on_train_epoch_start(trainer)
        bar = self.train_progress_bar
        bar.unit, bar.total = "step", trainer.max_steps if trainer.max_steps >= 0 else None
        bar.initial = bar.n = trainer.global_step
        bar.set_description("Training")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Update the progress bar, and read logged metrics at logging steps."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if is_logged_step(trainer, trainer.global_step):
            logged = trainer.callback_metrics
            self._shown = {title: float(logged[name]) for name, title in SHOWN.items() if name in logged}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics of the last logged step and Lightning's metrics, without the version number."""
        others = super().get_metrics(trainer, pl_module)
        others.pop("v_num", None)
        return self._shown | others
