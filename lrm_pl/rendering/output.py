"""Output of the renderer."""

import dataclasses

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

    def over(self, background: Float[Tensor, "*#rays 3"]) -> Float[Tensor, "*rays 3"]:
        """Composite the pixels over a background color."""
        return self.rgb + (1 - self.opacity).unsqueeze(-1) * background
