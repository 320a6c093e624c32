"""Regularizers on triplane features and rendered opacity."""

import math

from jaxtyping import Float
from torch import Tensor


def total_variation(planes: Float[Tensor, "B 3 F S S"]) -> Float[Tensor, ""]:
    """Return the mean squared difference between neighboring texels of the planes (TV loss of OpenLRM)."""
    planes = planes.float()
    return planes.diff(dim=-1).square().mean() + planes.diff(dim=-2).square().mean()


def opacity_prior(opacity: Float[Tensor, "n h w"]) -> Float[Tensor, ""]:
    """Return the mean of a prior that penalizes semi-transparent pixels (Neural Volumes, section 5).

    The prior of a pixel with opacity o is log(0.1 + o) + log(1.1 - o) - log(0.11), which is 0 at o = 0 and o = 1.
    """
    opacity = opacity.float()
    return ((0.1 + opacity).log() + (1.1 - opacity).log()).mean() - math.log(0.11)
