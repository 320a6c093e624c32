"""From an image to a field, a mesh, the frames of an orbit. Without gradients; ``lrm_pl.LRM`` is the short way.

network, renderer = read_pretrained(Path("model"))          # a folder of `lrm export` or `lrm convert`
scene = reconstruct(network, renderer, image, InputCamera(distance=2.0, fov_deg=50.0))
mesh = scene.mesh()
frames = scene.orbit(frames=60, size=256)
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import InputCamera, PosedCamera, orbit
from lrm_pl.meshing.mesh import Mesh
from lrm_pl.meshing.surface import colors_at, extract_mesh, surface_density
from lrm_pl.meshing.texture import textured
from lrm_pl.models.lrm import LRM
from lrm_pl.models.triplane import TriplaneField
from lrm_pl.progress import stage
from lrm_pl.rendering.occupancy import Occupancy, measure_occupancy
from lrm_pl.rendering.renderer import Renderer


@dataclasses.dataclass(frozen=True)
class Scene:
    """One reconstructed object.

    Attributes:
        field: Its field.
        camera: The camera of its image, canonical; it looks at the origin.
        renderer: The renderer that the network was trained with.
        usual_threshold: Density of the surface; None measures it of this object.
    """

    field: TriplaneField
    camera: InputCamera
    renderer: Renderer
    usual_threshold: float | None = None

    def to(self, device: torch.device | str) -> "Scene":
        """Return the scene with its field on a device; ``Trainer.predict`` moves what it returns to the CPU."""
        planes, weights = (
            self.field.planes.to(device),
            tuple(weight.to(device) for weight in self.field.weights),
        )
        return dataclasses.replace(
            self, field=dataclasses.replace(self.field, planes=planes, weights=weights)
        )

    @functools.cached_property
    def occupancy(self) -> Occupancy:
        """Where there is anything."""
        with stage("occupancy"), _half(self.field.planes.device):
            return measure_occupancy(self.field, 0)

    @functools.cached_property
    def threshold(self) -> float:
        """Density at which the surface lies.

        Raises:
            NoSurfaceError: There is nothing opaque.
        """
        if self.usual_threshold is not None:
            return self.usual_threshold
        occupancy = self.occupancy
        with stage("threshold"):
            return surface_density(
                self.field, 0, self.renderer, occupancy, self.camera.distance, self.camera.fxfycxcy
            )

    def mesh(
        self,
        threshold: float | None = None,
        resolution: int = 256,
        *,
        floaters: float = 0.0,
        most_faces: int | None = None,
    ) -> Mesh:
        """Cut the surface out of the density, read in float32: half precision makes terraces; see ``extract_mesh``.

        Args:
            threshold: Density at the surface; ``self.threshold`` unless given.
            resolution: Points of the lattice along each axis.
            floaters: Parts of less than this share of the largest part's area are left out.
            most_faces: Faces that may stay; None keeps all.

        Raises:
            NoSurfaceError: There is no surface at this threshold.
        """
        level = self.threshold if threshold is None else threshold
        return extract_mesh(
            self.field,
            0,
            level,
            resolution,
            bounds=self.renderer.bounds,
            floaters=floaters,
            most_faces=most_faces,
        )

    def textured(self, mesh: Mesh, size: int = 1024, limit_s: float = 60.0) -> Mesh:
        """Give a mesh of this object an image of its colors; see ``meshes.texture.textured``.

        Raises:
            UnwrapError: The mesh cannot be laid out in that time.
        """
        return textured(mesh, lambda points: colors_at(self.field, 0, points), size, limit_s)

    @torch.no_grad()
    def view(self, c2w: Float[Tensor, "4 4"], size: int) -> Float[Tensor, "size size 3"]:
        """Render one view over white, with the intrinsics of the input camera."""
        device = self.field.planes.device
        occupancy = self.occupancy
        with _half(device):
            pixels = self.renderer.draw(
                self.field,
                [occupancy],
                c2w.to(device)[None, None],
                self.camera.fxfycxcy.to(device)[None, None],
                (size, size),
            )
        return pixels.over(torch.ones(3, device=device))[0, 0].clamp(0, 1)

    def orbit(
        self, frames: int = 60, size: int = 256, elevation_deg: float = 0.0
    ) -> Iterator[Float[Tensor, "size size 3"]]:
        """Render frames on a circle about the object over white, the first from the side of the input image.

        Args:
            frames: How many.
            size: Side of a frame.
            elevation_deg: Height of the circle; 0 passes through the input camera.
        """
        for c2w in orbit(frames, self.camera.distance, elevation_deg):
            yield self.view(c2w, size)


@torch.no_grad()
def reconstruct(
    network: LRM,
    renderer: Renderer,
    image: Tensor,
    camera: InputCamera | PosedCamera = InputCamera(),  # noqa: B008 - frozen
    background: float = 1.0,
    threshold: float | None = None,
) -> Scene:
    """Reconstruct the object in an image.

    Args:
        network: A network of one input view, in evaluation mode.
        renderer: The renderer that it was trained with.
        image: (C, H, W), square, sRGB in [0, 1]; RGB over the background that the network was trained with, or RGBA
            with straight alpha, which is put over it.
        camera: The camera that it is taken to be seen by, or the one that it was seen by.
        background: Gray of that background; LRM's is white.
        threshold: Density of the surface; None measures it of the object.

    Raises:
        InputError: The image is no square RGB or RGBA image in [0, 1], or the network wants several.
    """
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[0] not in (3, 4) or shape[1] != shape[2] or shape[1] < 1:
        raise InputError(
            expected="a square image of 3 or 4 channels (RGB, or RGBA with straight alpha)",
            found=" x ".join(map(str, shape)),
            remedy="crop it, or convert it to RGBA",
        )
    if not image.is_floating_point():
        raise InputError(
            expected="an image of floats in [0, 1]", found=image.dtype, remedy="divide bytes by 255"
        )
    if not torch.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise InputError(
            expected="an image in [0, 1]",
            found=f"{image.min():.3g} to {image.max():.3g}",
            remedy="divide bytes by 255",
        )
    if network.input_views != 1:
        raise InputError(expected="a network of one input view", found=f"one of {network.input_views}")
    if shape[0] == 4 and not image[3].any():
        raise InputError(
            expected="an object in the image", found="alpha 0 everywhere", remedy="check its alpha channel"
        )
    device = next(network.parameters()).device
    rgb = image.to(device).float()
    if shape[0] == 4:
        rgb = rgb[:3] * rgb[3:] + background * (1 - rgb[3:])
    with stage("planes"), _half(device):
        triplane = network(
            rgb[None, None], camera.c2w.to(device)[None, None], camera.fxfycxcy.to(device)[None, None]
        )
        seen = camera if isinstance(camera, InputCamera) else InputCamera.like(*camera)
        return Scene(network.field(triplane), seen, renderer, threshold)


def as_tensor(image: Image.Image | np.ndarray) -> Float[Tensor, "C H W"]:
    """Turn an image, or an (H, W, C) array of bytes, into what ``reconstruct`` takes."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def as_pixels(image: Float[Tensor, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Turn a rendered image into bytes."""
    return (image.float().cpu().numpy() * 255).round().astype(np.uint8)


def _half(device: torch.device) -> torch.autocast:
    """Compute products in bf16, as in training; geometry stays float32."""
    return torch.autocast(device.type, torch.bfloat16)
