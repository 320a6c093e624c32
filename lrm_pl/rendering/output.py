"""The result of rendering."""

import dataclasses

from jaxtyping import Float
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Rendered pixels, before compositing over a background.

    Attributes:
        rgb: (*rays, 3) color, premultiplied by opacity, float32.
        opacity: (*rays) in [0, 1], float32.
        depth: (*rays) expected distance t, weighted by opacity, 0 for empty rays, float32.
    """

    rgb: Float[Tensor, "*rays 3"]
    opacity: Float[Tensor, "*rays"]
    depth: Float[Tensor, "*rays"]

    def over(self, background: Float[Tensor, "*#rays 3"]) -> Float[Tensor, "*rays 3"]:
        """Composite over a background color."""
        return self.rgb + (1 - self.opacity).unsqueeze(-1) * background
