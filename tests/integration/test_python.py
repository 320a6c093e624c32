"""Training from Python, with a plain Trainer: what it promises there is what `lrm fit` promises."""

import os
import shutil

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from lrm_pl.apps.train import LRMCLI
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.io.checkpoints import list_checkpoints, read_index
from lrm_pl.training.run_keeper import RunKeeper
from tests.integration.test_cli import TINY

# Lightning warns of small things (few workers, short runs) that are so by design here.
pytestmark = pytest.mark.filterwarnings("default")


class Seen(L.Callback):
    """Keeps the ids of each batch, and saves Lightning's checkpoint after four steps."""

    def __init__(self, path):
        self.ids, self.path = [], path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids.append(batch.ids)
        if trainer.global_step == 4 and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Counter(L.Callback):
    """Counts steps, with a state; and something that no checkpoint of ours can hold."""

    def __init__(self, odd: bool = False):
        self.count, self.best, self.odd = 0, torch.tensor(0.5, dtype=torch.float64), odd

    def on_train_batch_end(self, *args):
        self.count += 1

    def state_dict(self):
        return {"count": self.count, "best": self.best, "by name": [1.5, None]} | (
            {"odd": {1}} if self.odd else {}
        )

    def load_state_dict(self, state_dict):
        self.count, self.best, self.rest = state_dict["count"], state_dict["best"], state_dict["by name"]


@pytest.fixture
def fit(tmp_path, shards):
    """Fit a new module with a plain Trainer; returns the module, the trainer and what it saw."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))

    def run(steps, *callbacks, accumulate=1, **options):
        L.seed_everything(0)
        bare = [
            "-c",
            str(path),
            f"--data.folder={shards}",
            "--trainer.logger=false",
            "--trainer.callbacks=[]",
        ]
        made = LRMCLI(
            "fit", [*bare, "--trainer.max_steps=8", "--trainer.val_check_interval=8"], records=False
        )
        seen = Seen(tmp_path / "at-4.ckpt")
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, gradient_clip_val=1.0,
            limit_val_batches=0, enable_progress_bar=False, callbacks=[seen, *callbacks], max_epochs=-1,
            accumulate_grad_batches=accumulate, default_root_dir=tmp_path / "plain", use_distributed_sampler=False,
            log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(made.model, made.datamodule, **options)
        return made.model, trainer, seen

    return run


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumed_from_lightnings_checkpoint_is_the_uninterrupted_one(fit, tmp_path, accumulate):
    whole, _, seen = fit(6, accumulate=accumulate)
    again, trainer, after = fit(6, accumulate=accumulate, ckpt_path=tmp_path / "at-4.ckpt")
    assert trainer.global_step == 6
    assert len(seen.ids) == 6 * accumulate
    assert after.ids == seen.ids[4 * accumulate :]
    theirs = whole.lrm.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.lrm.state_dict().items())
    assert again.guard.state() == whole.guard.state()


def test_a_run_keeper_goes_on_in_its_folder_without_the_command_line(fit, tmp_path):
    whole, _, _ = fit(4, RunKeeper(every=2))
    shutil.rmtree(tmp_path / "plain/checkpoints/step-00000004")
    again, _, seen = fit(4, RunKeeper(every=2))
    assert len(seen.ids) == 2
    theirs = whole.lrm.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.lrm.state_dict().items())
    assert len(list_checkpoints(str(tmp_path / "plain/checkpoints"))) == 2
    with pytest.raises(InputError, match="expected one checkpoint to go on from, found ckpt_path"):
        fit(6, RunKeeper(), ckpt_path=tmp_path / "at-4.ckpt")
    keeper = RunKeeper(folder=str(tmp_path / "plain/checkpoints"))
    with pytest.raises(InputError, match=r"expected no checkpoints in .*, found 2"):
        keeper.choose("never")


def test_callbacks_go_on_with_their_state_and_what_cannot_be_kept_is_said(fit, tmp_path, caplog):
    fit(2, Counter(), RunKeeper(every=2))
    counter = Counter()
    fit(4, counter, RunKeeper(every=2))
    assert (counter.count, counter.best.dtype, float(counter.best), counter.rest) == (
        4,
        torch.float64,
        0.5,
        [1.5, None],
    )
    assert (
        read_index(str(tmp_path / "plain/checkpoints/step-00000004")).run["callbacks"]["Counter"]["count"]
        == 4
    )
    assert "the state of" not in caplog.text
    fit(6, Counter(odd=True), RunKeeper(every=2))
    assert (
        "the state of Counter is not in the checkpoint, and starts anew in a resumed run: expected"
        in caplog.text
    )


def test_the_seed_of_everything_is_the_seed_of_the_data(tmp_path, shards, monkeypatch):
    monkeypatch.setitem(os.environ, "PL_GLOBAL_SEED", "5")
    assert ShardDataModule(str(shards)).seed == 5
    assert ShardDataModule(str(shards), seed=3).seed == 3
    monkeypatch.delitem(os.environ, "PL_GLOBAL_SEED")
    assert ShardDataModule(str(shards)).seed == 0


def test_a_run_that_stopped_early_has_its_patience_still(fit):
    stopping = EarlyStopping("loss/total", patience=9, check_on_train_epoch_end=True)
    stopping.wait_count, stopping.best_score = 4, torch.tensor(0.0)
    fit(2, stopping, RunKeeper(every=2))
    other = EarlyStopping("loss/total", patience=9, check_on_train_epoch_end=True)
    fit(2, other, RunKeeper(every=2))
    assert other.wait_count >= 4
