"""A tiny network with random weights that draws something opaque, as the folder that `lrm export` makes."""

import pytest
import torch

from lrm_pl.data.input_framing import InputFraming
from lrm_pl.inference.pipeline import PretrainedLRM

MODEL = {
    "lrm": {
        "encoder": {"name": "vit_small_patch14_dinov2", "image_size": 28, "frozen": True},
        "decoder": {"channels": 4, "width": 8, "layers": 3},
        "dim": 16,
        "depth": 1,
        "heads": 2,
        "camera_dim": 8,
        "plane_tokens": 4,
    },
    "renderer": {"samples_per_ray": 16},
}

SETUP = InputFraming(distance=2.5, fov_deg=45.0, foreground=0.7)


def tiny_pretrained():
    torch.manual_seed(0)
    model = PretrainedLRM(MODEL, SETUP)
    with torch.no_grad():
        model.network.decoder.layers[-1].weight[0] *= 60
        model.network.decoder.layers[-1].bias[0] += 1
    return model


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """Read-only: copy before changing it."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    tiny_pretrained().save_pretrained(folder)
    return folder
