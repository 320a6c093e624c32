"""Settings that a trainer would ignore, or that a run would repeat or lose work by, are refused by name."""

import lightning as L
import pytest
from torch import nn

from lrm_pl.errors import InputError
from lrm_pl.training.supported import require_supported_settings, require_trained


def trainer(**options):
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm norm, found value"),
        ({"limit_train_batches": 2}, r"no trainer.limit_train_batches, found 2.*--trainer.max_steps"),
        ({"limit_train_batches": 0.5}, r"no trainer.limit_train_batches, found 0.5"),
        (
            {"accumulate_grad_batches": 2, "val_check_interval": 3},
            "found 3 and 2.*give --trainer.val_check_interval 4",
        ),
    ],
)
def test_a_setting_that_would_be_ignored_or_repeat_samples_is_refused(options, message):
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
    ],
)
@pytest.mark.filterwarnings("default")
def test_every_other_setting_is_let_through(options):
    require_supported_settings(trainer(**options))


def test_a_trainable_parameter_that_no_optimizer_has_is_refused_by_name():
    module = nn.ModuleDict({"lrm": nn.Linear(1, 1), "frozen": nn.Linear(1, 1).requires_grad_(False)})
    require_trained(module, module["lrm"])
    module["scale"] = nn.Linear(1, 1, bias=False)
    with pytest.raises(InputError, match=r"in module.lrm only, found scale.weight: "):
        require_trained(module, module["lrm"])
