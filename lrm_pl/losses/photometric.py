"""The terms that compare pixels: color in sRGB [0, 1] (LRM, section 3.4, eq. 1), and coverage."""

from jaxtyping import Float
from torch import Tensor

#: Opacity is squeezed into [margin, 1 - margin], so that no pixel costs infinity.
_MARGIN = 1e-4


def mse(prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """Average the squared error over images, channels and pixels."""
    return (prediction - target).square().mean()


def mask(opacity: Float[Tensor, "n h w"], alpha: Float[Tensor, "n h w"]) -> Float[Tensor, ""]:
    """Average the binary cross-entropy of opacity against the object's coverage (TripoSR, section 3.2)."""
    opacity, alpha = opacity.float(), alpha.float().clamp(0, 1)
    # Rounding may leave [0, 1] by an ulp; the gradient passes all the same, and at 0 and 1, where it matters most, it
    # is large and finite.
    inside = opacity + (opacity.clamp(0, 1) - opacity).detach()
    seen = inside * (1 - 2 * _MARGIN) + _MARGIN
    # Written out: PyTorch's own refuses to run under autocast on a GPU.
    return -(alpha * seen.log() + (1 - alpha) * (1 - seen).log()).mean()
