"""From samples to pixels: emission-absorption compositing (NeRF, section 4; Max 1995). Pure, float32."""

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.rendering.output import Rendering


def composite(
    sigma: Float[Tensor, "*rays K"],
    rgb: Float[Tensor, "*rays K 3"],
    t: Float[Tensor, "*rays K"],
    delta: Float[Tensor, "*rays"],
) -> Rendering:
    """Integrate colour along rays whose samples each stand for a bin of equal length.

    w_k = T_k (1 - exp(-sigma_k delta)), T_k = exp(-sum_{j<k} sigma_j delta): exact for a density that is constant
    in each bin, so a homogeneous box of length L has opacity 1 - exp(-sigma L) for any number of samples.

    Args:
        sigma: Density a scene unit, not negative.
        rgb: Colours.
        t: Distances of the samples.
        delta: Length of a bin of that ray.

    Returns:
        Premultiplied colour, opacity and depth. Differentiable in sigma and rgb.
    """
    optical = sigma.float() * delta.unsqueeze(-1)
    through = torch.cumsum(optical, dim=-1)
    weights = torch.exp(optical - through) * -torch.expm1(-optical)
    opacity = weights.sum(dim=-1)
    depth = (weights * t).sum(dim=-1) / opacity.clamp_min(1e-6)
    return Rendering((weights.unsqueeze(-1) * rgb.float()).sum(dim=-2), opacity, depth)
