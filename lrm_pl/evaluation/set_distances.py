"""Distances of sets of images: FID and KID."""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

#: Images of a subset, over a hundred of which KID is averaged (Binkowski et al. 2018: 1000).
_KID_SUBSET = 1000


def set_distances(features: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Measure FID and KID of each row's images against the targets, by torchmetrics.

    Args:
        features: "target" and each row -> (n, d).

    Returns:
        Row -> "fid" and "kid"; empty where there are no features.
    """
    found = {}
    for name, values in features.items():
        if name == "target":
            continue
        real, ours = (
            torch.from_numpy(np.asarray(array, dtype=np.float32)) for array in (features["target"], values)
        )
        given = _Given(real.shape[1])
        fid = FrechetInceptionDistance(feature=given)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")  # as it must
            kid = KernelInceptionDistance(feature=given, subset_size=min(_KID_SUBSET, len(real), len(ours)))
        for metric in (fid, kid):
            metric.update(real, real=True)
            metric.update(ours, real=False)
        # KID draws subsets at random
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            found[name] = {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}
    return found


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: the features are there already."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features
