"""The camera as the network sees it: an MLP on LRM's 20 numbers (section 3.2)."""

from jaxtyping import Float
from torch import Tensor, nn

from lrm_pl.geometry.cameras import camera_vector


class CameraEmbedder(nn.Module):
    """Embed the input camera: 16 numbers of the pose, 2 focal lengths, 2 of the principal point -> E.

    Args:
        dim: Width E of the embedding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(20, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, c2w: Float[Tensor, "B 4 4"], fxfycxcy: Float[Tensor, "B 4"]) -> Float[Tensor, "B E"]:
        """Embed canonical poses and normalised intrinsics."""
        return self.mlp(camera_vector(c2w, fxfycxcy))
