"""The progress bar of a run."""

import lightning as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from lrm_pl.callbacks.progress_bar import ProgressBar

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's own


class LoggingModel(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("val/heldout/psnr_pooled", 13.5, prog_bar=True)
        self.log("loss/total", 0.25)
        self.log("speed/samples_per_second", 2.0)
        return super().training_step(batch, batch_idx)


def trained(folder, steps, checkpoint=None, accumulate=1):
    bar = ProgressBar()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, limit_val_batches=0, callbacks=[bar], log_every_n_steps=1,
        accumulate_grad_batches=accumulate, logger=CSVLogger(folder, version="a_run"), enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(LoggingModel(), ckpt_path=checkpoint)
    return trainer, bar


def test_the_bar_of_a_resumed_run_includes_earlier_steps(tmp_path, capsys):
    trainer, _ = trained(tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    capsys.readouterr()
    trainer, bar = trained(tmp_path, 5, tmp_path / "three.ckpt")
    assert (bar.train_progress_bar.initial, bar.train_progress_bar.n, bar.train_progress_bar.total) == (
        3,
        5,
        5,
    )
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    assert list(shown.items()) == [("loss", 0.25), ("samples/s", 2.0), ("val/heldout/psnr_pooled", 13.5)]
    printed = capsys.readouterr().out
    assert " 4/5 [" in printed
    assert " 1/5 [" not in printed


def test_the_bar_counts_optimizer_steps_instead_of_batches(tmp_path):
    _, bar = trained(tmp_path, 3, accumulate=2)
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (3, 3)
