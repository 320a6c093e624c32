"""MLP that embeds a camera vector of 20 elements (LRM, section 3.2) or 16 elements (OpenLRM)."""

from jaxtyping import Float
from torch import Tensor, nn

from lrm_pl.geometry.cameras import CameraNumbers, camera_vector


class CameraEmbedder(nn.Module):
    """MLP that maps the pose, focal lengths and principal point of a camera to an embedding of width E.

    Args:
        dim: Width E of the embedding.
        numbers: Length of the camera vector (see ``camera_vector``).
    """

    def __init__(self, dim: int, numbers: CameraNumbers = 20) -> None:
        super().__init__()
        self.numbers: CameraNumbers = numbers
        self.mlp = nn.Sequential(nn.Linear(numbers, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(
        self, c2w: Float[Tensor, "*batch 4 4"], fxfycxcy: Float[Tensor, "*batch 4"]
    ) -> Float[Tensor, "*batch E"]:
        """Embed camera poses in the canonical frame and normalized intrinsics."""
        return self.mlp(camera_vector(c2w, fxfycxcy, self.numbers))
