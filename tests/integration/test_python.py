"""Training from Python with a plain Trainer, which has the same guarantees as `lrm fit`."""

import copy
import functools
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping

from lrm_pl.checkpoints.index import list_checkpoints, read_index
from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.losses.objective import Objective
from lrm_pl.training.checkpointing import CheckpointAndResume, StoppedError
from lrm_pl.training.ema import WeightAverage
from lrm_pl.training.gradient_guard import DivergedError
from lrm_pl.training.module import LRMModule
from lrm_pl.weights.encoders import pretrained_perceptual_loss
from tests.builders import TINY

# Lightning warns about few workers and short runs.
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

    def run(steps, *callbacks, accumulate=1, objective=None, **options):
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
        made.model.objective = objective or made.model.objective
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


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_run_resumed_from_a_lightning_checkpoint_equals_the_uninterrupted_run(fit, tmp_path, accumulate):
    whole, _, seen = fit(6, accumulate=accumulate)
    again, trainer, after = fit(6, accumulate=accumulate, ckpt_path=tmp_path / "at-4.ckpt")
    assert trainer.global_step == 6
    assert len(seen.ids) == 6 * accumulate
    assert after.ids == seen.ids[4 * accumulate :]
    theirs = whole.lrm.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.lrm.state_dict().items())
    assert again.guard.state() == whole.guard.state()


def test_checkpoint_and_resume_resumes_without_the_command_line(fit, tmp_path):
    whole, _, _ = fit(4, CheckpointAndResume(every=2))
    shutil.rmtree(tmp_path / "plain/checkpoints/step-00000004")
    again, _, seen = fit(4, CheckpointAndResume(every=2))
    assert len(seen.ids) == 2
    theirs = whole.lrm.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.lrm.state_dict().items())
    assert len(list_checkpoints(str(tmp_path / "plain/checkpoints"))) == 2
    with pytest.raises(InputError, match="expected one checkpoint to resume from, but found ckpt_path"):
        fit(6, CheckpointAndResume(), ckpt_path=tmp_path / "at-4.ckpt")
    checkpointing = CheckpointAndResume(folder=str(tmp_path / "plain/checkpoints"))
    with pytest.raises(InputError, match=r"expected no checkpoints in .*, but found 2"):
        checkpointing.choose("never")


class Poison(L.Callback):
    """Makes every gradient NaN."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.lrm.transformer.parameters():
            parameter.grad.fill_(math.nan)


class SignalAfterTwoSteps(L.Callback):
    """Sends SIGTERM to this process after two steps."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("callback", "steps", "error", "message"),
    [
        (Poison(), 40, DivergedError, "found 10 consecutive violations up to step 10"),
        (
            SignalAfterTwoSteps(),
            4,
            StoppedError,
            "stopped by a signal after step 2. The state was saved in .*step-00000002",
        ),
    ],
)
def test_fit_raises_an_error_after_divergence_or_a_stop_signal(fit, callback, steps, error, message):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error, match=message):
        fit(steps, callback, CheckpointAndResume())
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_run_in_the_same_checkpoint_folder_is_rejected(fit, root, tmp_path):
    folder = tmp_path / "plain/checkpoints"
    code = "import sys; from pathlib import Path; from lrm_pl.training.run_folder import RunLock; "
    code += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": root}
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match=r"Another run is using .* folder of CheckpointAndResume"):
            fit(2, CheckpointAndResume())
        other.stdin.close()
        other.wait(20)
    fit(2, CheckpointAndResume())
    fit(3, CheckpointAndResume())


def test_a_data_module_restarts_from_the_first_sample_in_the_next_fit(fit, tmp_path):
    fit(2, CheckpointAndResume())
    module, trainer, _ = fit(4, CheckpointAndResume())
    assert trainer.datamodule.position(4) == 8
    seen = Seen(tmp_path / "none.ckpt")
    other = L.Trainer(
        max_steps=3, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        limit_val_batches=0, enable_progress_bar=False, callbacks=[seen], default_root_dir=tmp_path,
    )  # fmt: skip
    other.fit(module, trainer.datamodule)
    assert (other.global_step, len(seen.ids)) == (3, 3)
    assert other.datamodule.position(3) == 6


def test_callback_states_are_restored_and_unsupported_states_are_reported(fit, tmp_path, caplog):
    fit(2, Counter(), CheckpointAndResume(every=2))
    counter = Counter()
    fit(4, counter, CheckpointAndResume(every=2))
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
    assert "The state of" not in caplog.text
    fit(6, Counter(odd=True), CheckpointAndResume(every=2))
    assert "The state of Counter is not saved, so a resumed run resets it: expected" in caplog.text


def test_the_moving_average_is_restored_from_a_lightning_checkpoint(fit, tmp_path):
    whole, again = WeightAverage(0.9), WeightAverage(0.9)
    fit(6, whole, Seen(tmp_path / "averaged.ckpt"))
    fit(6, again, ckpt_path=tmp_path / "averaged.ckpt")
    assert whole.average.keys() == again.average.keys()
    assert all(torch.equal(whole.average[name], again.average[name]) for name in whole.average)


class OwnOptimizer(LRMModule):
    """Module with a custom learning rate schedule."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def test_optimizers_schedules_and_data_that_cannot_be_resumed_are_rejected(fit, tmp_path):
    module, trainer, _ = fit(1)
    plain = functools.partial(
        L.Trainer, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path, max_steps=2, limit_val_batches=0,
    )  # fmt: skip
    own = OwnOptimizer(module.lrm, module.renderer, module.objective)
    with pytest.raises(
        InputError,
        match=r"only the AdamW optimizer of model.optimizer, but found StepLR from configure_optim",
    ):
        plain().fit(own, trainer.datamodule)
    own.configure_optimizers = lambda: torch.optim.SGD(own.lrm.parameters(), lr=0.1)
    with pytest.raises(
        InputError,
        match=r"only the AdamW optimizer of model.optimizer, but found SGD from configure_optimizers",
    ):
        plain().fit(own, trainer.datamodule)
    loader = trainer.datamodule.train_dataloader()
    with pytest.raises(InputError, match=r"expected a ShardDataModule, .*found none. Call trainer"):
        plain(callbacks=[CheckpointAndResume(folder=str(tmp_path / "kept"))]).fit(module, loader)


def test_the_global_seed_is_the_default_seed_of_the_data(tmp_path, shards, monkeypatch):
    monkeypatch.setitem(os.environ, "PL_GLOBAL_SEED", "5")
    assert ShardDataModule(str(shards)).seed == 5
    assert ShardDataModule(str(shards), seed=3).seed == 3
    monkeypatch.delitem(os.environ, "PL_GLOBAL_SEED")
    assert ShardDataModule(str(shards)).seed == 0


def test_the_state_of_early_stopping_is_restored_but_not_its_patience(fit):
    stopping = EarlyStopping("loss/total", patience=9, check_on_train_epoch_end=True)
    stopping.wait_count, stopping.best_score = 4, torch.tensor(0.0)
    fit(2, stopping, CheckpointAndResume(every=2))
    other = EarlyStopping("loss/total", patience=9, check_on_train_epoch_end=True)
    fit(2, other, CheckpointAndResume(every=2))
    assert other.wait_count >= 4
    more = EarlyStopping("loss/total", patience=20, check_on_train_epoch_end=True)
    fit(2, more, CheckpointAndResume(every=2))
    assert more.patience == 20, "the patience of the current start"


def test_a_run_that_early_stopping_ended_is_not_continued(fit, caplog):
    def stopping(patience):
        one = EarlyStopping("loss/total", patience=patience, check_on_train_epoch_end=True)
        one.best_score = torch.tensor(0.0)
        return one

    fit(2, stopping(1), CheckpointAndResume())
    _, trainer, seen = fit(4, stopping(1), CheckpointAndResume())
    assert (trainer.global_step, seen.ids) == (2, [])
    assert "EarlyStopping ended this run at step 2. Increase its patience" in caplog.text
    _, trainer, _ = fit(4, stopping(9), CheckpointAndResume())
    assert trainer.global_step == 4


def test_validate_and_test_return_metrics_and_predict_returns_scenes(fit, tmp_path, caplog):
    caplog.set_level("INFO")
    module, trainer, _ = fit(2)
    assert "The encoder test_vit starts from random weights" in caplog.text
    data = trainer.datamodule
    data.workers = 0
    plain = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    names = {f"val/{s}/{m}" for s in ("unseen", "heldout") for m in ("psnr", "psnr_pooled", "ssim")}
    for measure in (plain.validate, plain.test):
        found = {name: value for part in measure(module, data, verbose=False) for name, value in part.items()}
        assert found.keys() >= names
        assert 0 < found["val/heldout/psnr_pooled"] < 60
    assert caplog.text.count("Validation measures PSNR and SSIM. For LPIPS") == 2, "once per trainer"
    scenes = [scene for batch in plain.predict(module, data) for scene in batch]
    assert len(scenes) == 2
    assert scenes[0].render(torch.eye(4), 8).shape == (8, 8, 3)


def test_images_with_nan_values_result_in_nan_metrics(fit, tmp_path, caplog):
    module, trainer, _ = fit(1)
    with torch.no_grad():
        module.lrm.transformer.tokens.fill_(torch.nan)
    plain = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    found = plain.validate(module, trainer.datamodule, verbose=False)
    assert all(math.isnan(part[name]) for part in found for name in part if name.startswith("val/"))
    assert (
        "The metrics of the heldout set at step 0 are NaN: image metrics: expected finite predictions"
        in caplog.text
    )


def test_the_default_objective_loads_its_lpips_network(fit, monkeypatch):
    pinned = functools.partial(pretrained_perceptual_loss, source="pypi")
    monkeypatch.setattr("lrm_pl.training.module.pretrained_perceptual_loss", pinned)
    module, _, _ = fit(1, objective=Objective())
    assert module.objective.perceptual.name == "vgg"


def test_missing_trainers_and_missing_modules_are_reported(fit, tmp_path, shards):
    data = ShardDataModule(str(shards))
    for make in (data.train_dataloader, data.val_dataloader, data.predict_dataloader, data.state_dict):
        with pytest.raises(
            InputError,
            match=r"expected a data module with a trainer and a completed setup, .* data\.trainer = Tr",
        ):
            make()
    module, _, _ = fit(4, CheckpointAndResume(every=4))
    path = tmp_path / "at-4.ckpt"
    with pytest.raises(TypeError, match="missing a required argument: 'lrm'"):
        LRMModule.load_from_checkpoint(path)
    with pytest.raises(InputError, match=r"found the folder .*step-00000004. For inference, use lrm_pl"):
        LRMModule.load_from_checkpoint(tmp_path / "plain/checkpoints/step-00000004")
    parts = {name: getattr(module, name) for name in ("renderer", "objective")}
    lrm = copy.deepcopy(module.lrm)
    torch.nn.init.zeros_(lrm.transformer.tokens)
    again = LRMModule.load_from_checkpoint(path, lrm=lrm, **parts)
    assert torch.equal(again.lrm.transformer.tokens, module.lrm.transformer.tokens)
    assert again.lrm.encoder.has_weights


def test_the_script_of_the_readme_trains(root, shards, tmp_path, monkeypatch, capsys):
    text = (root / "lrm_pl/README.md").read_text()
    script = re.search(r"## From Python\n\n```python\n(.*?)```", text, re.DOTALL)[1]
    encoder = {"name": "vit_small_patch14_dinov2", "image_size": 28, "frozen": True}
    model = TINY["model"] | {"lrm": TINY["model"]["lrm"] | {"encoder": encoder}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(model))
    less = {
        "configs/model/small.yaml": str(tmp_path / "tiny.yaml"),
        '"dinov2_vits14"': '"dinov2_vits14", source="pypi"',
        "lpips_start_step=1900": "lpips_start_step=2",
        '"data/mine", batch_size=4': f"{str(shards)!r}, batch_size=2, side_views=1, streams=2, workers=0",
        "max_steps=2000": "max_steps=2, accelerator='cpu'",
        "val_check_interval=500": "val_check_interval=2",
        "runs/python": str(tmp_path / "run"),
    }  # fmt: skip
    for part, smaller in less.items():
        assert part in script
        script = script.replace(part, smaller)
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(compile(script, "README.md", "exec"), made)
    assert len(list_checkpoints(str(tmp_path / "run/checkpoints"))) == 1
    assert [len(batch) for batch in made["scenes"]] == [1, 1]
    assert "'val/heldout/psnr_pooled': " in capsys.readouterr().out
