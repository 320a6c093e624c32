"""The camera as the network sees it: an MLP on LRM's 20 numbers, or on OpenLRM's 16 (section 3.2)."""

from jaxtyping import Float
from torch import Tensor, nn

from lrm_pl.geometry.cameras import CameraNumbers, camera_vector


class CameraEmbedder(nn.Module):
    """Embed cameras: the numbers of the pose, 2 focal lengths, 2 of the principal point -> E.

    Args:
        dim: Width E of the embedding.
        numbers: How many numbers a camera is; see ``camera_vector``.
    """

    def __init__(self, dim: int, numbers: CameraNumbers = 20) -> None:
        super().__init__()
        self.numbers: CameraNumbers = numbers
        self.mlp = nn.Sequential(nn.Linear(numbers, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(
        self, c2w: Float[Tensor, "*batch 4 4"], fxfycxcy: Float[Tensor, "*batch 4"]
    ) -> Float[Tensor, "*batch E"]:
        """Embed canonical poses and normalized intrinsics."""
        return self.mlp(camera_vector(c2w, fxfycxcy, self.numbers))
