"""From a picture to a field, a mesh, the frames of an orbit. Functions, without gradients; no command yet.

network, renderer = read_pretrained(Path("model"))          # a folder of `lrm export` or `lrm convert`
scene = reconstruct(network, image, InputCamera(distance=2.0, fov_deg=50.0))
mesh = scene.mesh(threshold=10.0)
frames = scene.orbit(renderer, frames=60, size=256)
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import canonical_pose, orbit
from lrm_pl.models.lrm import LRM
from lrm_pl.models.triplane import TriplaneField
from lrm_pl.rendering.occupancy import measure_occupancy
from lrm_pl.rendering.surface import Mesh, extract_mesh
from lrm_pl.rendering.volume import Renderer


@dataclasses.dataclass(frozen=True)
class InputCamera:
    """The camera that a picture is taken to be seen by; a network without a camera does not ask.

    Attributes:
        distance: From the object's middle, in scene units (LRM and OpenLRM: 2).
        fov_deg: Field of view of the whole picture.
    """

    distance: float = 2.0
    fov_deg: float = 50.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.distance <= 0 or not 0 < self.fov_deg < 180:
            raise InputError(f"expected a distance above 0 and a fov_deg between 0 and 180, found {self}")

    @property
    def c2w(self) -> Float[Tensor, "4 4"]:
        """The canonical pose."""
        return canonical_pose(self.distance)

    @property
    def fxfycxcy(self) -> Float[Tensor, "4"]:
        """Normalised intrinsics of a square picture."""
        focal = 0.5 / math.tan(math.radians(self.fov_deg / 2))
        return torch.tensor([focal, focal, 0.5, 0.5])


@dataclasses.dataclass(frozen=True)
class Scene:
    """One reconstructed object.

    Attributes:
        field: Its field.
        camera: The camera of its picture, canonical.
    """

    field: TriplaneField
    camera: InputCamera

    def mesh(self, threshold: float, resolution: int = 384) -> Mesh:
        """Cut the surface out of the density, read in float32: half precision makes terraces; see ``extract_mesh``.

        Raises:
            NoSurfaceError: There is no surface at this threshold.
        """
        return extract_mesh(self.field, 0, threshold, resolution)

    @torch.no_grad()
    def orbit(
        self, renderer: Renderer, frames: int = 60, size: int = 256, elevation_deg: float = 0.0
    ) -> Iterator[Float[Tensor, "size size 3"]]:
        """Render frames on a circle about the object over white, the first from the side of the input picture.

        Args:
            renderer: The renderer that the network was trained with.
            frames: How many.
            size: Side of a frame.
            elevation_deg: Height of the circle; 0 passes through the input camera.
        """
        device = self.field.planes.device
        with _half(device):
            occupancy = measure_occupancy(self.field, 0)
        fxfycxcy = self.camera.fxfycxcy.to(device)[None, None]
        for c2w in orbit(frames, self.camera.distance, elevation_deg).to(device):
            with _half(device):
                pixels = renderer.draw(self.field, [occupancy], c2w[None, None], fxfycxcy, (size, size))
            yield pixels.over(torch.ones(3, device=device))[0, 0].clamp(0, 1)


@torch.no_grad()
def reconstruct(
    network: LRM,
    image: Tensor,
    camera: InputCamera = InputCamera(),
) -> Scene:
    """Reconstruct the object in a picture.

    Args:
        network: A network of one input view, in evaluation mode.
        image: (C, H, W), square, sRGB in [0, 1]; RGB over the background that the network was trained with (white),
            or RGBA with straight alpha, which is put over white.
        camera: The camera that it is taken to be seen by.

    Raises:
        InputError: The picture is no square RGB or RGBA picture in [0, 1], or the network wants several.
    """
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[0] not in (3, 4) or shape[1] != shape[2] or shape[1] < 1:
        raise InputError(
            "expected a square picture of 3 or 4 channels (RGB, or RGBA with straight alpha), found "
            f"{' x '.join(map(str, shape))}; crop it, or convert it to RGBA"
        )
    if not image.is_floating_point():
        raise InputError(f"expected a picture of floats in [0, 1], found {image.dtype}; divide bytes by 255")
    if not torch.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise InputError(
            f"expected a picture in [0, 1], found {image.min():.3g} to {image.max():.3g}; divide bytes by 255"
        )
    if network.input_views != 1:
        raise InputError(f"expected a network of one input view, found one of {network.input_views}")
    device = next(network.parameters()).device
    picture = image.to(device).float()
    if shape[0] == 4:
        if not picture[3].any():
            raise InputError(
                "expected an object in the picture, found alpha 0 everywhere; check its alpha channel"
            )
        picture = picture[:3] * picture[3:] + 1 - picture[3:]
    with _half(device):
        triplane = network(
            picture[None, None], camera.c2w.to(device)[None, None], camera.fxfycxcy.to(device)[None, None]
        )
        return Scene(network.field(triplane), camera)


def _half(device: torch.device) -> torch.autocast:
    """Compute products in bf16, as in training; geometry stays float32."""
    return torch.autocast(device.type, torch.bfloat16)
