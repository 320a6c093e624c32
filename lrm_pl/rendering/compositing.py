"""Volume rendering quadrature: from samples to pixels (NeRF, section 4; Max 1995). Pure functions, float32."""

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
    """Composite the samples of each ray, each with constant density over its interval.

    Args:
        sigma: Density per unit length, non-negative.
        rgb: Colors.
        t: Distances of the samples along the ray.
        delta: Lengths of the samples' intervals.

    Returns:
        Premultiplied color, opacity and depth. Differentiable in sigma and rgb.
    """
    weights = sample_weights(sigma, delta)
    opacity = weights.sum(dim=-1)
    depth = (weights * t).sum(dim=-1) / opacity.clamp_min(1e-6)
    return Rendering((weights.unsqueeze(-1) * rgb.float()).sum(dim=-2), opacity, depth)


def sample_weights(
    sigma: Float[Tensor, "*rays K"], delta: Float[Tensor, "*rays #K"]
) -> Float[Tensor, "*rays K"]:
    """Compute the compositing weight of each sample.

    w_k = T_k (1 - exp(-sigma_k delta_k)), T_k = exp(-sum_{j<k} sigma_j delta_j): exact for a density that is constant
    over each interval, so a homogeneous box of length L has opacity 1 - exp(-sigma L) for any number of samples.
    """
    optical_depth = sigma.float() * delta
    accumulated = torch.cumsum(optical_depth, dim=-1)
    return torch.exp(optical_depth - accumulated) * -torch.expm1(-optical_depth)
