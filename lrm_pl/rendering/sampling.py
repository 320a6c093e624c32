"""Where to sample a ray: evenly spread distances, and more of them where the first ones saw something. Float32."""

import torch
from jaxtyping import Float
from torch import Tensor


def stratified(
    near: Float[Tensor, "*rays"],
    far: Float[Tensor, "*rays"],
    samples: int,
    jitter: Float[Tensor, "*rays"] | None,
    *,
    overshoot: bool = False,
) -> tuple[Float[Tensor, "*rays K"], Float[Tensor, "*rays"]]:
    """Put one sample into each of K equal bins of [near, far].

    Args:
        near: (...) start of the interval.
        far: (...) end of the interval.
        samples: K.
        jitter: (...) in [0, 1), the place inside the bin, one number a ray (shifting all its samples together
            keeps them evenly spaced: less noise than K independent draws); None takes the middle.
        overshoot: Make the bins (far - near) / (K - 1) long, so that the last one begins at ``far`` (EG3D).

    Returns:
        ``t`` (..., K) and the length of a bin (...).
    """
    width = (far - near) / (samples - 1 if overshoot else samples)
    steps = torch.arange(samples, dtype=torch.float32, device=near.device)
    place = steps + 0.5 if jitter is None else steps + jitter.unsqueeze(-1)
    return near.unsqueeze(-1) + place * width.unsqueeze(-1), width


def importance(
    edges: Float[Tensor, "*rays bins_plus_1"],
    weights: Float[Tensor, "*rays bins"],
    samples: int,
    jitter: Float[Tensor, "*rays"] | None,
) -> Float[Tensor, "*rays samples"]:
    """Draw distances from a density that is constant between edges (NeRF, section 5.2), in ascending order.

    Args:
        edges: Ascending distances.
        weights: Not negative; the density of each bin times its length, in any unit.
        samples: How many.
        jitter: In [0, 1), one number a ray: the place inside each of ``samples`` equal shares of probability; None
            spreads them from 0 to 1 inclusive.
    """
    weights = weights + 1e-5  # a ray that saw nothing is sampled evenly
    cumulative = (weights / weights.sum(-1, keepdim=True)).cumsum(-1)
    cumulative = torch.cat([torch.zeros_like(cumulative[..., :1]), cumulative], dim=-1)
    if jitter is None:
        u = torch.linspace(0, 1, samples, device=edges.device).expand(*edges.shape[:-1], samples)
    else:
        u = (torch.arange(samples, device=edges.device) + jitter.unsqueeze(-1)) / samples
    above = torch.searchsorted(cumulative, u.contiguous(), right=True).clamp_max(weights.shape[-1])
    below = (above - 1).clamp_min(0)
    low, high = cumulative.gather(-1, below), cumulative.gather(-1, above)
    share = (u - low) / torch.where(high - low < 1e-5, 1, high - low)
    start, end = edges.gather(-1, below), edges.gather(-1, above)
    return start + share * (end - start)


def widened(weights: Float[Tensor, "*rays bins"]) -> Float[Tensor, "*rays bins"]:
    """Spread weights over to their neighbors, with a floor, so that surfaces between samples are found.

    The larger of each two neighbors, then the mean of each two, plus 0.01 (mip-NeRF, section 3.1; EG3D).
    """
    zero = torch.zeros_like(weights[..., :1])
    padded = torch.cat([zero, weights, zero], dim=-1)
    larger = torch.maximum(padded[..., :-1], padded[..., 1:])
    return (larger[..., :-1] + larger[..., 1:]) / 2 + 0.01
