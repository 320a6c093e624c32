"""LPIPS with its pretrained network."""

from pathlib import Path

from lrm_pl.losses.perceptual import LpipsNet, PerceptualLoss
from lrm_pl.weights.encoders import load_lpips_features
from lrm_pl.weights.resolve import WeightSource


def pretrained_perceptual_loss(
    net: LpipsNet = "vgg",
    *,
    source: WeightSource = "any",
    path: str | Path | None = None,
    sha256: str | None = None,
) -> PerceptualLoss:
    """Load the network's weights and build the loss; arguments and errors as ``load_lpips_features``."""
    return PerceptualLoss(load_lpips_features(net, source=source, path=path, sha256=sha256), net)
