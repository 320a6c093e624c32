"""Volume rendering quadrature, which composites samples to pixels (NeRF, section 4; Max 1995).

All functions are pure and compute in float32.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.rendering.output import Rendering


def composite(
    sigma: Float[Tensor, "*rays K"],
    rgb: Float[Tensor, "*rays K 3"],
    t: Float[Tensor, "*rays K"],
    delta: Float[Tensor, "*rays #K"],
) -> Rendering:
    """Composite the samples of each ray, with a constant density over the interval of each sample.

    Args:
        sigma: Non-negative densities per unit of length.
        rgb: Colors of the samples.
        t: Distances of the samples along the ray.
        delta: Lengths of the intervals.

    Returns:
        Premultiplied color, opacity and depth, which are differentiable with respect to ``sigma`` and ``rgb``.
    """
    weights = sample_weights(sigma, delta)
    opacity = weights.sum(dim=-1)
    depth = (weights * t).sum(dim=-1) / opacity.clamp_min(1e-6)
    return Rendering((weights.unsqueeze(-1) * rgb.float()).sum(dim=-2), opacity, depth)


def sample_weights(
    sigma: Float[Tensor, "*rays K"], delta: Float[Tensor, "*rays #K"]
) -> Float[Tensor, "*rays K"]:
    """Compute the compositing weight of each sample.

    The weight of sample k is T_k (1 - exp(-sigma_k delta_k)), where T_k = exp(-sum_{j<k} sigma_j delta_j). The weights
    are exact for a density that is constant over each interval. A homogeneous box of length L therefore has opacity
    1 - exp(-sigma L) for any number of samples.
    """
    optical_depth = sigma.float() * delta
    accumulated = torch.cumsum(optical_depth, dim=-1)
    return torch.exp(optical_depth - accumulated) * -torch.expm1(-optical_depth)
