"""Terms that no image asks for, on planes and opacities; each 0 where there is nothing to object to."""

import math

from jaxtyping import Float
from torch import Tensor


def total_variation(planes: Float[Tensor, "B 3 F S S"]) -> Float[Tensor, ""]:
    """Average the squared differences of neighboring plane cells: smooth planes (OpenLRM's TV loss)."""
    planes = planes.float()
    return planes.diff(dim=-1).square().mean() + planes.diff(dim=-2).square().mean()


def opacity_prior(opacity: Float[Tensor, "n h w"]) -> Float[Tensor, ""]:
    """Punish pixels that are neither clear nor opaque (Neural Volumes, Lombardi et al. 2019, section 5).

    log(0.1 + o) + log(1.1 - o), shifted so that it is 0 at o = 0 and o = 1.
    """
    opacity = opacity.float()
    return ((0.1 + opacity).log() + (1.1 - opacity).log()).mean() - math.log(0.11)
