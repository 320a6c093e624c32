"""Short training run in this process, and its results."""

import copy
import dataclasses

import lightning as L
import pytest
import torch
import yaml
from torch import nn

from lrm_pl.checkpoints.index import newest_checkpoint
from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.cli.run_start import checkpointing_of
from lrm_pl.weights.encoders import pretrained_perceptual_loss

DATA = {
    "batch_size": 2,
    "side_views": 1,
    "unseen_views": 2,
    "workers": 0,
    "streams": 2,
    "crop": {"low": 16, "high": 32, "size": 16},
}

TRAINER = {
    "accelerator": "cpu",
    "max_steps": 1,
    "val_check_interval": 1,
    "limit_val_batches": 1,
    "log_every_n_steps": 1,
    "precision": "32-true",
}


@pytest.fixture(scope="session")
def lpips_networks():
    """Return the LPIPS networks."""
    return {net: pretrained_perceptual_loss(net, source="pypi") for net in ("vgg", "alex")}


@dataclasses.dataclass
class Trained:
    """A finished run.

    Attributes:
        module: The trained module.
        logged: Logged metrics of each step.
        gradients: Gradients of the first step before clipping.
        checkpoint: The last checkpoint.
    """

    module: L.LightningModule
    logged: list[dict[str, float]]
    gradients: dict[str, torch.Tensor]
    checkpoint: object


class Watch(L.Callback):
    """Record the gradients of the first step and the metrics of every step."""

    def __init__(self):
        self.gradients, self.logged = {}, []

    def on_after_backward(self, trainer, pl_module):
        if not self.gradients:
            named = pl_module.lrm.named_parameters()
            self.gradients = {name: p.grad.cpu().clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def smooth(loss):
    """Replace ReLU and max pooling in LPIPS, at whose kinks rounding errors change a gradient by up to 1e-3."""
    found = copy.deepcopy(loss)
    for module in list(found.network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
            elif isinstance(child, nn.MaxPool2d):
                setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride))
    return found


def train(model, folder, shards, networks, monkeypatch, *options, **trainer):
    """Train a model for one step, validate it, and save a checkpoint in a folder."""
    folder.mkdir(parents=True)
    config = {
        "seed_everything": 2,  # with seed 1, the gradient norms of the branches differ by 1e-4
        "model": model,
        "data": DATA,
        "weights": {"pretrained": False, "source": "pypi"},
        "trainer": TRAINER | trainer,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(
        "lrm_pl.cli.run_start.pretrained_perceptual_loss", lambda net, **_: smooth(networks[net])
    )
    cli = LRMCLI("fit", 
        ["-c", str(folder / "config.yaml"), "--data.folder", str(shards), "--run.folder", str(folder / "run"),
         *options], records=False)  # fmt: skip
    # Layers initialized to zero would not propagate gradients.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in cli.model.lrm.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    watch = Watch()
    cli.trainer.callbacks.append(watch)
    cli.before_fit()
    cli.trainer.fit(cli.model, cli.datamodule)
    checkpointing_of(cli.trainer).signals.restore()
    logged = watch.logged
    logged.append({name: float(value) for name, value in cli.trainer.callback_metrics.items()})
    checkpoint = newest_checkpoint(str(folder / "run" / "checkpoints"), print)
    return Trained(cli.model, logged, watch.gradients, checkpoint)
