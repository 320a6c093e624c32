"""Networks that turn images into features: CLIP's image tower (timm), and the Inception network of FID and KID."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.errors import InputError
from lrm_pl.weights.key_map import read_tensor_file
from lrm_pl.weights.resolve import hash_file, resolve

#: timm's name of CLIP ViT-B/32 with OpenAI's weights: what papers call CLIP similarity, unless they say otherwise.
CLIP_NAME = "vit_base_patch32_clip_quickgelu_224.openai"

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Embed = Callable[[Tensor], Tensor]


def load_clip(path: Path, sha256: str, device: torch.device) -> Embed:
    """Load CLIP's image tower.

    Args:
        path: timm's state dict of ``CLIP_NAME`` (.safetensors or .pth), with the projection as its head.
        sha256: Its hash.
        device: Where it computes.

    Returns:
        Images (n, 3, h, w) in [0, 1] -> (n, 512).

    Raises:
        InputError: The file is another one.
    """
    import timm

    if not path.is_file() or (found := hash_file(path)) != sha256.lower():
        raise InputError(
            expected=f"CLIP's image tower at {path} with sha256 {sha256}",
            found="no file" if not path.is_file() else found,
            remedy=f"timm's {CLIP_NAME} on the Hugging Face hub has it (model.safetensors)",
        )
    network = timm.create_model(CLIP_NAME.partition(".")[0], pretrained=False, num_classes=512)
    try:
        network.load_state_dict(read_tensor_file(path, "CLIP"), strict=True)
    except RuntimeError as error:
        raise InputError(
            subject=path, expected=f"the state dict of timm's {CLIP_NAME}", found=error
        ) from error
    network = network.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (_CLIP_MEAN, _CLIP_STD))

    def embed(images: Tensor) -> Tensor:
        resized = F.interpolate(images.to(device), (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return network((resized - mean) / std)

    return embed


def load_inception(path: str | None, sha256: str | None, device: torch.device) -> tuple[Embed, str]:
    """Load the Inception network of FID through torch-fidelity.

    Args:
        path: Its file; None uses_input for it as for other weights.
        sha256: Its hash, where it is another file.
        device: Where it computes.

    Returns:
        Images (n, 3, h, w) in [0, 1] -> (n, 2048), and the file's hash.

    Raises:
        InputError: torch-fidelity is not installed, or nothing gave the file.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(
            expected="torch-fidelity to measure FID and KID",
            found="none",
            remedy="pip install -e '.[evaluate]'",
        ) from error
    found = resolve("inception", path=path, sha256=sha256)
    network = FeatureExtractorInceptionV3(
        "inception", ["2048"], feature_extractor_weights_path=str(found.path)
    )
    network = network.eval().to(device)

    def features(images: Tensor) -> Tensor:
        (values,) = network((images * 255).round().to(torch.uint8).to(device))
        return values

    return features, found.sha256
