"""The photometric term: mean squared error of pixels in sRGB [0, 1] (LRM, section 3.4, eq. 1)."""

from jaxtyping import Float
from torch import Tensor


def mse(prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """Average the squared error over images, channels and pixels."""
    return (prediction - target).square().mean()
