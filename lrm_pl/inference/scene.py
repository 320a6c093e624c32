"""Reconstructed objects, which can be rendered and converted to meshes. Gradients are not supported."""

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
from lrm_pl.inference.options import TEXTURE_FACES, TEXTURE_SIDE, MeshOptions
from lrm_pl.meshing.mesh import Mesh
from lrm_pl.meshing.surface import extract_mesh, sample_colors, surface_density
from lrm_pl.meshing.texture import bake_texture
from lrm_pl.meshing.unwrap import UnwrapError
from lrm_pl.models.lrm import LRM
from lrm_pl.models.triplane import TriplaneField
from lrm_pl.progress import stage
from lrm_pl.rendering.empty_space import Occupancy, measure_occupancy
from lrm_pl.rendering.renderer import Renderer


@dataclasses.dataclass(frozen=True)
class Scene:
    """A reconstructed object.

    Attributes:
        field: Radiance field of the object.
        camera: Camera of the input image in the canonical frame.
        renderer: Renderer of the model.
        default_threshold: Density at the surface. If None, it is estimated for this object.
    """

    field: TriplaneField
    camera: InputCamera
    renderer: Renderer
    default_threshold: float | None = None

    def to(self, device: torch.device | str) -> "Scene":
        """Return a copy of the scene on a device. ``Trainer.predict`` calls this method to move results to the CPU."""
        field = dataclasses.replace(
            self.field,
            planes=self.field.planes.to(device),
            weights=tuple(weight.to(device) for weight in self.field.weights),
        )
        return dataclasses.replace(self, field=field)

    @functools.cached_property
    def occupancy(self) -> Occupancy:
        """Occupancy grid of the field, which is computed when this property is first accessed."""
        with stage("occupancy"), _autocast(self.field.planes.device):
            return measure_occupancy(self.field, 0)

    @functools.cached_property
    def threshold(self) -> float:
        """Density at the surface, which is estimated when first accessed unless ``default_threshold`` is set.

        Raises:
            NoSurfaceError: The object is transparent everywhere.
        """
        if self.default_threshold is not None:
            return self.default_threshold
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
        max_faces: int | None = None,
    ) -> Mesh:
        """Extract a mesh with vertex colors.

        Densities are computed in float32 because the precision of bf16 would cause steps in the surface.

        Args:
            threshold: Density at the surface. If None, ``self.threshold`` is used.
            resolution: Resolution of the density grid.
            floaters: Minimum area of a connected component, as a fraction of the area of the largest component.
            max_faces: Maximum number of faces. If None, the number of faces is not limited.

        Raises:
            NoSurfaceError: There is no surface at this threshold.
        """
        return extract_mesh(
            self.field,
            0,
            self.threshold if threshold is None else threshold,
            resolution,
            bounds=self.renderer.bounds,
            floaters=floaters,
            max_faces=max_faces,
        )

    def bake_texture(self, mesh: Mesh, size: int = TEXTURE_SIDE, limit_s: float = 60.0) -> Mesh:
        """Return a copy of a mesh with UV coordinates and a texture.

        Args:
            mesh: Mesh of this scene.
            size: Approximate side length of the texture in pixels.
            limit_s: Time limit for UV unwrapping in seconds.

        Raises:
            UnwrapError: UV unwrapping failed or exceeded the time limit.
        """
        return bake_texture(mesh, lambda points: sample_colors(self.field, 0, points), size, limit_s)

    @torch.no_grad()
    def render(
        self,
        c2w: Float[Tensor, "4 4"],
        size: int | tuple[int, int],
        fxfycxcy: Float[Tensor, "4"] | None = None,
    ) -> Float[Tensor, "H W 3"]:
        """Render one view over a white background.

        Args:
            c2w: OpenCV camera-to-world matrix.
            size: Side length of a square image, or height and width of the image, in pixels.
            fxfycxcy: Normalized intrinsics. If None, the intrinsics of the input camera are used.

        Returns:
            RGB image of shape (H, W, 3) with values in [0, 1].
        """
        height, width = (size, size) if isinstance(size, int) else size
        fxfycxcy = self.camera.fxfycxcy if fxfycxcy is None else fxfycxcy
        device = self.field.planes.device
        occupancy = self.occupancy
        with _autocast(device):
            pixels = self.renderer.draw(
                self.field,
                [occupancy],
                c2w.to(device)[None, None],
                fxfycxcy.to(device)[None, None],
                (height, width),
            )
        return pixels.over(torch.ones(3, device=device))[0, 0].clamp(0, 1)

    def orbit(
        self, frames: int = 60, size: int = 256, elevation_deg: float = 0.0
    ) -> Iterator[Float[Tensor, "size size 3"]]:
        """Render frames of a circular orbit over a white background.

        The orbit begins at the azimuth of the input camera and has the same distance from the origin.

        Args:
            frames: Number of frames.
            size: Side length of a frame in pixels.
            elevation_deg: Elevation of the orbit in degrees. The input camera has an elevation of 0.

        Yields:
            RGB images of shape (size, size, 3) with values in [0, 1].
        """
        for c2w in orbit(frames, self.camera.distance, elevation_deg):
            yield self.render(c2w, size)


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
        network: Single-view network in evaluation mode.
        renderer: Renderer that the network was trained with.
        image: Square sRGB image of shape (C, H, W) with values in [0, 1]. An RGB image must have the background
            used in training, and an RGBA image must have straight alpha.
        camera: Assumed or known camera of the image.
        background: Gray level that RGBA images are composited over. LRM uses white.
        threshold: Density at the surface. If None, it is estimated for this object.

    Raises:
        InputError: The image is not a square RGB or RGBA image in [0, 1], or the network requires several views.
    """
    shape = tuple(image.shape)
    if len(shape) != 3 or shape[0] not in (3, 4) or shape[1] != shape[2] or shape[1] < 1:
        raise InputError(
            expected="a square image with 3 or 4 channels (RGB, or RGBA with straight alpha)",
            found=" x ".join(map(str, shape)),
            remedy="crop the image, or convert it to RGBA",
        )
    in_range = torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 1
    if not image.is_floating_point() or not in_range:
        raise InputError(
            expected="an image of floats in [0, 1]",
            found=f"{image.dtype} from {image.min():.3g} to {image.max():.3g}",
            remedy="divide 8-bit values by 255",
        )
    if network.input_views != 1:
        raise InputError(
            expected="a single-view network", found=f"a network with {network.input_views} input views"
        )
    if shape[0] == 4 and not image[3].any():
        raise InputError(
            expected="an object in the image",
            found="only transparent pixels",
            remedy="check the alpha channel",
        )
    device = next(network.parameters()).device
    rgb = image.to(device).float()
    if shape[0] == 4:
        rgb = rgb[:3] * rgb[3:] + background * (1 - rgb[3:])
    with stage("planes"), _autocast(device):
        triplane = network(
            rgb[None, None], camera.c2w.to(device)[None, None], camera.fxfycxcy.to(device)[None, None]
        )
        input_camera = camera if isinstance(camera, InputCamera) else InputCamera.like(*camera)
        return Scene(network.field(triplane), input_camera, renderer, threshold)


def make_mesh(scene: Scene, options: MeshOptions) -> tuple[Mesh, list[str]]:
    """Extract the mesh of an object, and bake a texture if ``options.texture`` is not 0.

    Returns:
        The mesh, and warnings about options that could not be satisfied.

    Raises:
        NoSurfaceError: There is no surface at the threshold.
    """
    limit = TEXTURE_FACES if options.max_faces is None and options.texture else options.max_faces
    mesh = scene.mesh(options.threshold, options.resolution, floaters=options.floaters, max_faces=limit)
    warnings = []
    if limit is not None and len(mesh.faces) > limit:
        warnings.append(
            f"{len(mesh.faces)} faces instead of {limit}: further decimation would open the surface"
        )
    if not options.texture:
        return mesh, warnings
    try:
        return scene.bake_texture(mesh, options.texture, options.texture_limit_s), warnings
    except UnwrapError as error:
        return mesh, [*warnings, f"vertex colors instead of a texture: {error}"]


def to_tensor(image: Image.Image | np.ndarray) -> Float[Tensor, "C H W"]:
    """Convert an image, or a uint8 array of shape (H, W, C), to a tensor of shape (C, H, W) with values in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def to_uint8(image: Float[Tensor, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Convert a rendered image with values in [0, 1] to a uint8 array."""
    return (image.float().cpu().numpy() * 255).round().astype(np.uint8)


def _autocast(device: torch.device) -> torch.autocast:
    """Return a context manager that computes matrix products in bf16, as in training, but geometry in float32."""
    return torch.autocast(device.type, torch.bfloat16)
