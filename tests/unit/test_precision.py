import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lrm_pl.errors import InputError
from lrm_pl.losses.objective import Objective
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.image_metrics import ImageMetricsLogger
from lrm_pl.training.module import LRMModule
from lrm_pl.training.precision import DisableTF32, require_supported_precision
from tests.builders import tiny_lrm

#: Lightning's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),
]


class Linear(L.LightningModule):
    """Record whether TF32 is enabled in forward and in backward."""

    def __init__(self, *, fails=False):
        super().__init__()
        self.layer, self.fails, self.allowed = nn.Linear(2, 1), fails, []

    def configure_callbacks(self):
        return [DisableTF32()]

    def training_step(self, batch, batch_idx):
        self.note()
        if self.fails:
            raise KeyError
        loss = self.layer(batch).sum()
        loss.register_hook(lambda _: self.note())
        return loss

    def note(self):
        self.allowed.append(torch.backends.cudnn.allow_tf32)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, precision):
    trainer = L.Trainer(accelerator="cpu", barebones=True, max_steps=1, precision=precision)
    trainer.fit(module, DataLoader(torch.ones(2, 2), batch_size=2))


@pytest.mark.parametrize(("precision", "allowed"), [("32-true", False), ("bf16-mixed", True)])
def test_tf32_is_disabled_only_with_float32_precision(precision, allowed):
    module = Linear()
    fit(module, precision)
    assert module.allowed == [allowed] * 2
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_the_tf32_setting_is_restored_after_an_error():
    module = Linear(fails=True)
    with pytest.raises(KeyError):
        fit(module, "32-true")
    assert module.allowed == [False]
    assert torch.backends.cudnn.allow_tf32


def test_the_module_adds_missing_callbacks():
    module = LRMModule(tiny_lrm(), Renderer(8), Objective(lpips=0.0))

    def brought(*callbacks):
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        module.trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), **options)
        return [type(callback) for callback in module.configure_callbacks()]

    assert brought() == [DisableTF32, ImageMetricsLogger]
    assert brought(ImageMetricsLogger()) == [DisableTF32]
    assert brought(ImageMetricsLogger(), DisableTF32()) == []


def set_up(precision):
    module = LRMModule(tiny_lrm(), Renderer(8), Objective(lpips=0.0))
    module.trainer = L.Trainer(accelerator="cpu", barebones=True, precision=precision)
    module.setup("fit")


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_without_float32_weights_are_rejected(precision):
    with pytest.raises(InputError, match=f"expected trainer.precision bf16-mixed, .*, but found {precision}"):
        set_up(precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", 32])
def test_short_names_of_precisions_are_accepted(precision):
    set_up(precision)


@pytest.mark.parametrize(("short", "full"), [("32", "32-true"), ("16", "16-mixed"), ("bf16", "bf16-mixed")])
def test_estimate_accepts_the_precisions_of_fit(short, full):
    assert require_supported_precision(short) == require_supported_precision(full) == full
