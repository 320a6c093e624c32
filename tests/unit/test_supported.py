"""Tests of rejected trainer settings and callbacks."""

import lightning as L
import pytest
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn

from lrm_pl.errors import InputError
from lrm_pl.training.supported import (
    require_optimized_parameters,
    require_supported_length,
    require_supported_settings,
)


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", **{"max_steps": 4, **quiet, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm norm, but found value"),
        ({"limit_train_batches": 2}, r"limit_train_batches 1.0, .* found 2.*--trainer.max_steps"),
        ({"limit_train_batches": 0.5}, r"limit_train_batches 1.0, .* found 0.5"),
        (
            {"accumulate_grad_batches": 2, "val_check_interval": 3},
            "accumulate_grad_batches 2, but found 3. Use --trainer.val_check_interval 4",
        ),
        (
            {"val_check_interval": 0},
            "accumulate_grad_batches 1, but found 0.*--trainer.limit_val_batches 0",
        ),
        ({"log_every_n_steps": -1}, "log_every_n_steps of at least 0, but found -1"),
        ({"overfit_batches": 1}, "overfit_batches 0, .* found 1.*overfit.yaml"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val, a maximum norm, of at least 0, but found -1.0"),
        ({"gradient_clip_val": float("nan")}, "of at least 0, but found nan"),
        (
            {"val_check_interval": "00:00:10:00"},
            "val_check_interval to be a positive multiple of .*, but found a duration",
        ),
    ],
)
def test_unsupported_settings_are_rejected(options, message):
    with pytest.raises(InputError, match=message):
        require_supported_settings(trainer(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_algorithm": "norm"},
        {"fast_dev_run": True},
        {"accumulate_grad_batches": 2, "val_check_interval": 4},
        {"accumulate_grad_batches": 2, "val_check_interval": 1.0},
        {"gradient_clip_val": 0.0},
        {"gradient_clip_val": 1},
        {"max_epochs": -1, "min_epochs": 1},
        {"max_time": "00:00:01:00"},
        {"callbacks": [EarlyStopping("val/heldout/psnr")]},
    ],
)
@pytest.mark.filterwarnings("default")
def test_supported_settings_are_accepted(options):
    require_supported_settings(trainer(**options))
    require_supported_length(trainer(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_steps": 2}, "min_steps null, because it disables signals .* found 2"),
        ({"min_epochs": 2}, "min_epochs null, because it disables signals .* found 2"),
        ({"max_epochs": 2}, "max_epochs -1, .* found 2. .*--trainer.max_steps"),
        ({"max_epochs": 0}, "max_epochs -1, .* found 0"),
        (
            {"check_val_every_n_epoch": 2},
            "check_val_every_n_epoch null, .* found 2. .*--trainer.val_check_interval",
        ),
    ],
)
@pytest.mark.filterwarnings("default")
def test_only_max_steps_sets_the_length_of_a_run(options, message):
    with pytest.raises(InputError, match=message):
        require_supported_length(trainer(**options))


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        (GradientAccumulationScheduler({0: 2}), "--trainer.accumulate_grad_batches"),
        (EMAWeightAveraging(decay=0.9), "lrm_pl.training.ema.WeightAverage"),
        (StochasticWeightAveraging(swa_lrs=1e-3), "lrm_pl.training.ema.WeightAverage"),
        (LearningRateFinder(), "--model.optimizer.lr"),
        (BatchSizeFinder(), "`lrm estimate`"),
        (BackboneFinetuning(), "--model.lrm.encoder.frozen true"),
        (ModelPruning("l1_unstructured"), "Prune an exported network"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsupported_callbacks_are_rejected(callback, remedy):
    with pytest.raises(
        InputError, match=f"The callback {type(callback).__name__} is not supported: .*{remedy}"
    ):
        require_supported_settings(trainer(callbacks=[callback]))


def test_trainable_parameters_without_an_optimizer_are_rejected():
    module = nn.ModuleDict({"lrm": nn.Linear(1, 1), "frozen": nn.Linear(1, 1).requires_grad_(False)})
    require_optimized_parameters(module, module["lrm"])
    module["scale"] = nn.Linear(1, 1, bias=False)
    with pytest.raises(InputError, match=r"in module.lrm only, but found scale.weight, which"):
        require_optimized_parameters(module, module["lrm"])
