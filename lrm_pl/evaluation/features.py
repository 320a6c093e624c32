"""Image features for CLIP similarity, FID and KID."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from lrm_pl.errors import InputError
from lrm_pl.weights.encoders import load_encoder_file
from lrm_pl.weights.resolve import resolve

#: Name of OpenAI's CLIP ViT-B/32 in timm, the usual encoder of CLIP similarity in papers.
CLIP_NAME = "vit_base_patch32_clip_quickgelu_224.openai"

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

#: Maximum size of the random subsets over which KID is averaged (Binkowski et al. 2018: 1000).
_KID_SUBSET = 1000

Embed = Callable[[Tensor], Tensor]


def load_clip(path: Path, sha256: str, device: torch.device) -> Embed:
    """Load the image encoder of CLIP.

    Args:
        path: File with the state dict of the timm model ``CLIP_NAME`` (.safetensors or .pth), including the projection
            head.
        sha256: Expected sha256 of the file.
        device: Device of the network.

    Returns:
        Function that maps images (n, 3, h, w) in [0, 1] to embeddings (n, 512).

    Raises:
        InputError: The file does not exist, has a different hash, or does not match the network.
    """
    import timm

    state = load_encoder_file(CLIP_NAME, path, sha256)
    network = timm.create_model(CLIP_NAME.partition(".")[0], pretrained=False, num_classes=512)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(
            subject=path, expected=f"the state dict of the timm model {CLIP_NAME}", found=error
        ) from error
    network = network.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (_CLIP_MEAN, _CLIP_STD))

    def embed(images: Tensor) -> Tensor:
        resized = F.interpolate(images.to(device), (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        return network((resized - mean) / std)

    return embed


def load_inception(path: str | None, sha256: str | None, device: torch.device) -> tuple[Embed, str]:
    """Load the Inception network for FID and KID from torch-fidelity.

    Args:
        path: Path of the weight file. If None, the cache is searched and the file is downloaded if necessary.
        sha256: Expected sha256 of the file. If None, the file must contain the standard weights.
        device: Device of the network.

    Returns:
        Function that maps images (n, 3, h, w) in [0, 1] to features (n, 2048), and the sha256 of the file.

    Raises:
        InputError: torch-fidelity is not installed, or the weights are not available.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise InputError(
            expected="an installation of torch-fidelity to compute FID and KID",
            found="none",
            remedy="install it with pip install -e '.[evaluate]'",
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


def set_distances(features: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Compute FID and KID between the targets and the images of the model and of each baseline, with torchmetrics.

    Args:
        features: Features (n, d) of the targets (key "target"), the model and each baseline.

    Returns:
        Metrics "fid" and "kid" of the model and each baseline.
    """
    found = {}
    for name, values in features.items():
        if name == "target":
            continue
        real, ours = (
            torch.from_numpy(np.asarray(array, dtype=np.float32)) for array in (features["target"], values)
        )
        extractor = _PrecomputedFeatures(real.shape[1])
        fid = FrechetInceptionDistance(feature=extractor)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
            kid = KernelInceptionDistance(
                feature=extractor, subset_size=min(_KID_SUBSET, len(real), len(ours))
            )
        for metric in (fid, kid):
            metric.update(real, real=True)
            metric.update(ours, real=False)
        # KID samples subsets with the global random number generator.
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            found[name] = {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
    return found


class _PrecomputedFeatures(nn.Module):
    """Feature extractor that lets torchmetrics use precomputed features, which it returns unchanged."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features
