"""The terms that compare pixels: colour in sRGB [0, 1] (LRM, section 3.4, eq. 1), and coverage."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def mse(prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """Average the squared error over images, channels and pixels."""
    return (prediction - target).square().mean()


def mask(opacity: Float[Tensor, "n h w"], alpha: Float[Tensor, "n h w"]) -> Float[Tensor, ""]:
    """Average the binary cross-entropy of opacity against the object's coverage (TripoSR, section 3.2)."""
    # Rounding may leave [0, 1] by an ulp, and a clear pixel of an opaque object would cost infinity.
    return F.binary_cross_entropy(opacity.float().clamp(1e-4, 1 - 1e-4), alpha.float().clamp(0, 1))
