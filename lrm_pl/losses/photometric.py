"""Per-pixel loss terms: squared error of sRGB colors in [0, 1] (LRM, section 3.4, eq. 1) and mask cross-entropy."""

from jaxtyping import Float
from torch import Tensor

#: Margin of the range [margin, 1 - margin] of opacity in the cross-entropy, which is thus finite.
_MARGIN = 1e-4


def mse_loss(prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]) -> Float[Tensor, ""]:
    """Return the mean squared error over images, channels and pixels."""
    return (prediction - target).square().mean()


def mask_loss(opacity: Float[Tensor, "n h w"], alpha: Float[Tensor, "n h w"]) -> Float[Tensor, ""]:
    """Return the mean binary cross-entropy between opacity and alpha (TripoSR, section 3.2)."""
    opacity, alpha = opacity.float(), alpha.float().clamp(0, 1)
    # Rounding can move opacity out of [0, 1]. The straight-through clamp does not change the gradient.
    clamped = opacity + (opacity.clamp(0, 1) - opacity).detach()
    probability = clamped * (1 - 2 * _MARGIN) + _MARGIN
    # F.binary_cross_entropy does not run under autocast on a GPU.
    return -(alpha * probability.log() + (1 - alpha) * (1 - probability).log()).mean()
