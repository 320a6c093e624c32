"""Output of the renderer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Rendered pixels, before compositing over a background.

    Attributes:
        rgb: Float32 colors of shape (*rays, 3), premultiplied by opacity.
        opacity: Float32 opacities of shape (*rays) in [0, 1].
        depth: Float32 expected distances t of shape (*rays), which are 0 for empty rays.
    """

    rgb: Float[Tensor, "*rays 3"]
    opacity: Float[Tensor, "*rays"]
    depth: Float[Tensor, "*rays"]

    @classmethod
    def zeros(cls, shape: Sequence[int], like: Tensor) -> "Rendering":
        """Return transparent pixels of shape (*shape) with the device and dtype of ``like``."""
        return cls(*(like.new_zeros(size) for size in ((*shape, 3), shape, shape)))

    def __setitem__(self, index: Any, pixels: "Rendering") -> None:  # noqa: ANN401 - an index of a tensor
        """Assign pixels to an index in place."""
        self.rgb[index], self.opacity[index], self.depth[index] = pixels.rgb, pixels.opacity, pixels.depth

    def view(self, shape: Sequence[int]) -> "Rendering":
        """Return a view of the pixels with shape (*shape)."""
        return Rendering(self.rgb.view(*shape, 3), self.opacity.view(*shape), self.depth.view(*shape))

    def over(self, background: Float[Tensor, "*#rays 3"]) -> Float[Tensor, "*rays 3"]:
        """Composite the pixels over a background color."""
        return self.rgb + (1 - self.opacity).unsqueeze(-1) * background
