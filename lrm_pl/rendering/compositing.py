"""From samples to pixels: emission-absorption compositing (NeRF, section 4; Max 1995). Pure, float32."""

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
    """Integrate color along rays whose samples each stand for a bin.

    Args:
        sigma: Density a unit of length, not negative.
        rgb: Colors.
        t: Distances of the samples.
        delta: Lengths of their bins.

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
    """Compute each sample's share of the pixel.

    w_k = T_k (1 - exp(-sigma_k delta_k)), T_k = exp(-sum_{j<k} sigma_j delta_j): exact for a density that is constant
    in each bin, so a homogeneous box of length L has opacity 1 - exp(-sigma L) for any number of samples.
    """
    optical = sigma.float() * delta
    through = torch.cumsum(optical, dim=-1)
    return torch.exp(optical - through) * -torch.expm1(-optical)
