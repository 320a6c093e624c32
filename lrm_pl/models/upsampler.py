"""Upsampling of triplane tokens to planes (LRM, section 3.2)."""

from jaxtyping import Float
from torch import Tensor, nn


class Upsampler(nn.Module):
    """Deconvolution from triplane tokens to planes, with the same weights for the three planes.

    The kernels do not overlap. The s x s tokens of a plane become S x S texels, where S = ``factor`` s.

    Args:
        dim: Width D of the tokens.
        channels: Number F of channels per plane.
        factor: Kernel size and stride of the deconvolution.
    """

    def __init__(self, dim: int, channels: int, factor: int = 2) -> None:
        super().__init__()
        self.deconvolution = nn.ConvTranspose2d(dim, channels, kernel_size=factor, stride=factor)

    def forward(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B 3 F S S"]:
        """Arrange the tokens as planes in row-major order, and upsample the planes."""
        batch, length, dim = tokens.shape
        side = round((length // 3) ** 0.5)
        assert 3 * side * side == length, (length, side)
        planes = tokens.view(batch * 3, side, side, dim).permute(0, 3, 1, 2)
        return self.deconvolution(planes).unflatten(0, (batch, 3))
