"""What rendering returns."""

import dataclasses

from jaxtyping import Float
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Pixels of rays, over no background yet.

    Attributes:
        rgb: (*rays, 3) color, premultiplied by opacity, float32.
        opacity: (*rays) in [0, 1], float32.
        depth: (*rays) expected distance t of the part that is opaque, 0 where nothing is, float32.
    """

    rgb: Float[Tensor, "*rays 3"]
    opacity: Float[Tensor, "*rays"]
    depth: Float[Tensor, "*rays"]

    def over(self, background: Float[Tensor, "*#rays 3"]) -> Float[Tensor, "*rays 3"]:
        """Composite over a background color."""
        return self.rgb + (1 - self.opacity).unsqueeze(-1) * background
