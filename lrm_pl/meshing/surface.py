"""Mesh extraction by marching cubes (scikit-image; Lewiner et al. 2003), with vertex colors."""

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import find_objects
from skimage.measure import marching_cubes
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import orbit
from lrm_pl.geometry.rays import Bounds
from lrm_pl.meshing.mesh import Mesh, decimate, remove_floaters
from lrm_pl.progress import stage
from lrm_pl.rendering.density_grid import density_grid, query_color, query_density
from lrm_pl.rendering.empty_space import Occupancy
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.renderer import Renderer

#: Number of views per elevation from which the surface density is measured, their side in pixels, and the elevations.
_VIEWS, _VIEW_SIDE, _ELEVATIONS_DEG = 4, 48, (-20.0, 20.0)


class NoSurfaceError(InputError):
    """Error raised if there is no surface because the density does not cross the threshold."""


@torch.no_grad()
def extract_mesh(
    field: Field,
    index: int,
    threshold: float,
    resolution: int = 384,
    *,
    bounds: Bounds = "box",
    floaters: float = 0.0,
    max_faces: int | None = None,
) -> Mesh:
    """Extract the isosurface of the density of one object.

    Args:
        field: Fields of B objects.
        index: Index of the object.
        threshold: Density at the surface, per unit of length of the renderer (OpenLRM: 3; TripoSR: 25).
        resolution: Number of grid points along each axis (LRM: 384).
        bounds: Bounds of the renderer. The density outside the bounds, where the model is not trained, is set to zero.
        floaters: Minimum area of a connected component as a fraction of the area of the largest component. Smaller
            components are removed.
        max_faces: Maximum number of faces. If None, the number is not limited.

    Raises:
        NoSurfaceError: There is no surface at this threshold, or no faces remain after decimation.
    """
    with stage("grid"):
        density = density_grid(field, index, resolution, threshold).cpu()
    if bounds == "sphere":
        axis = torch.linspace(-1, 1, resolution).square()
        density[axis[:, None, None] + axis[:, None] + axis > 1] = 0
    _require_both_sides(density, threshold)
    for dim in range(3):  # close the surface at the faces of the box
        density.select(dim, 0).zero_()
        density.select(dim, -1).zero_()
    _require_both_sides(density, threshold)
    with stage("marching cubes"):
        vertices, faces = _marching_cubes(density, threshold)
    if floaters:
        with stage("floaters"):
            vertices, faces = remove_floaters(vertices, faces, floaters)
    if max_faces is not None:
        with stage("decimation"):
            vertices, faces = decimate(vertices, faces, max_faces)
    if not len(faces):
        raise NoSurfaceError(
            expected=f"a surface of at most {max_faces} faces",
            found="no faces after decimation",
            remedy="increase the maximum number of faces",
        )
    with stage("colors"):
        return Mesh(vertices, faces, sample_colors(field, index, vertices))


def _require_both_sides(density: Tensor, threshold: float) -> None:
    low, high = float(density.min()), float(density.max())
    if not low <= threshold < high:
        raise NoSurfaceError(
            expected=f"densities below and above the threshold {threshold:g}",
            found=f"densities from {low:.3g} to {high:.3g}",
            remedy="choose a threshold in this range, or train longer",
        )


def _marching_cubes(density: Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    # Marching cubes is run on the bounding box of the surface. The box is not at the faces of the grid, which are zero.
    (box,) = find_objects((density > threshold).numpy().view(np.uint8))
    low = [part.start - 1 for part in box]
    region = density[tuple(slice(part.start - 1, part.stop + 1) for part in box)]
    positions, faces, _, _ = marching_cubes(region.numpy(), threshold, gradient_direction="ascent")
    vertices = (positions + np.array(low)) * (2 / (len(density) - 1)) - 1
    return vertices.astype(np.float32), faces.astype(np.int64)


@torch.no_grad()
def sample_colors(field: Field, index: int, points: Float[np.ndarray, "Q 3"]) -> Float[np.ndarray, "Q 3"]:
    """Return the sRGB colors in [0, 1] of one object at the given points."""
    queries = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)).to(field.planes.device)
    return query_color(field, index, queries).float().clamp(0, 1).cpu().numpy()


@torch.no_grad()
def surface_density(
    field: Field,
    index: int,
    renderer: Renderer,
    occupancy: Occupancy,
    distance: float,
    fxfycxcy: Float[Tensor, "4"],
) -> float:
    """Estimate the isosurface threshold of one object as the median density at the expected depth of opaque rays.

    A fixed threshold is not suitable for all objects because the density at the visible surface depends on the
    sharpness of the predicted surface.

    Args:
        field: Fields of B objects.
        index: Index of the object.
        renderer: Renderer with which the network was trained.
        occupancy: Occupancy grid of the object.
        distance: Distance of the cameras from the origin in scene units.
        fxfycxcy: Normalized intrinsics of the cameras.

    Raises:
        NoSurfaceError: No view has an opaque pixel.
    """
    device = field.planes.device
    poses = torch.cat([orbit(_VIEWS, distance, elevation) for elevation in _ELEVATIONS_DEG])
    c2w, cameras = poses.to(device)[None], fxfycxcy.to(device).expand(1, len(poses), 4)
    size = (_VIEW_SIDE, _VIEW_SIDE)
    rendering = renderer.draw(field, [occupancy], c2w, cameras, size)
    rays = renderer.rays(c2w, cameras, size)
    opaque = (rendering.opacity.flatten() > 0.5).nonzero().squeeze(-1)
    if not len(opaque):
        density = density_grid(field, index, 64)
        raise NoSurfaceError(
            expected="an object with opaque pixels",
            found=f"no opaque pixels in any view, and densities from {density.min():.3g} to {density.max():.3g}",
            remedy="choose a threshold in this range, or train longer",
        )
    t = rendering.depth.flatten()[opaque, None]
    points = rays.origins.flatten(0, 1)[opaque] + t * rays.directions.flatten(0, 1)[opaque]
    return float(query_density(field, index, points).median())
