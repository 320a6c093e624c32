"""Stratified sampling and importance sampling of distances along rays, in float32."""

import torch
from jaxtyping import Float
from torch import Tensor


def sample_stratified(
    near: Float[Tensor, "*rays"],
    far: Float[Tensor, "*rays"],
    samples: int,
    jitter: Float[Tensor, "*rays"] | None,
    *,
    overshoot: bool = False,
) -> tuple[Float[Tensor, "*rays K"], Float[Tensor, "*rays"]]:
    """Place one sample in each of K equal bins of [near, far].

    Args:
        near: Start of the interval of each ray.
        far: End of the interval of each ray.
        samples: Number K of samples per ray.
        jitter: Position of the samples of each ray in their bins, in [0, 1). A ray has one position for all bins, so
            its samples are evenly spaced, which is less noisy than K independent draws. If None, samples are at bin
            centers.
        overshoot: Whether to make the bins (far - near) / (K - 1) long, so that the last bin starts at ``far`` (EG3D).

    Returns:
        Distances of shape (..., K) and bin lengths of shape (...).
    """
    width = (far - near) / (samples - 1 if overshoot else samples)
    steps = torch.arange(samples, dtype=torch.float32, device=near.device)
    position = steps + (0.5 if jitter is None else jitter.unsqueeze(-1))
    return near.unsqueeze(-1) + position * width.unsqueeze(-1), width


def sample_importance(
    edges: Float[Tensor, "*rays bins_plus_1"],
    weights: Float[Tensor, "*rays bins"],
    samples: int,
    jitter: Float[Tensor, "*rays"] | None,
) -> Float[Tensor, "*rays samples"]:
    """Draw distances by inverse transform sampling of a piecewise-constant density (NeRF, section 5.2).

    Args:
        edges: Edges of the bins in ascending order.
        weights: Non-negative, unnormalized probability of each bin.
        samples: Number of samples per ray.
        jitter: Position of the samples of each ray in strata of equal probability, in [0, 1). If None, the samples are
            placed at evenly spaced quantiles from 0 to 1 inclusive.

    Returns:
        Distances of the samples along each ray, in ascending order.
    """
    weights = weights + 1e-5  # an empty ray is sampled uniformly
    cumulative = (weights / weights.sum(-1, keepdim=True)).cumsum(-1)
    cumulative = torch.cat([torch.zeros_like(cumulative[..., :1]), cumulative], dim=-1)
    if jitter is None:
        u = torch.linspace(0, 1, samples, device=edges.device).expand(*edges.shape[:-1], samples)
    else:
        u = (torch.arange(samples, device=edges.device) + jitter.unsqueeze(-1)) / samples
    above = torch.searchsorted(cumulative, u.contiguous(), right=True).clamp_max(weights.shape[-1])
    below = (above - 1).clamp_min(0)
    low, high = cumulative.gather(-1, below), cumulative.gather(-1, above)
    fraction = (u - low) / torch.where(high - low < 1e-5, 1, high - low)
    start, end = edges.gather(-1, below), edges.gather(-1, above)
    return start + fraction * (end - start)


def blur_weights(weights: Float[Tensor, "*rays bins"]) -> Float[Tensor, "*rays bins"]:
    """Blur weights so that importance sampling finds surfaces between samples (mip-NeRF, section 3.1; EG3D).

    The maxima of all pairs of neighbors are computed, and neighboring maxima are averaged. Then 0.01 is added.
    """
    zero = torch.zeros_like(weights[..., :1])
    padded = torch.cat([zero, weights, zero], dim=-1)
    larger = torch.maximum(padded[..., :-1], padded[..., 1:])
    return (larger[..., :-1] + larger[..., 1:]) / 2 + 0.01
