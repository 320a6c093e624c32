"""From a field to a mesh: marching cubes (scikit-image's, Lewiner et al. 2003) and colors at the vertices."""

import numpy as np
import torch
from jaxtyping import Float
from skimage.measure import marching_cubes
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import orbit
from lrm_pl.geometry.rays import Bounds
from lrm_pl.meshing.mesh import Mesh
from lrm_pl.meshing.simplify import decimated, without_floaters
from lrm_pl.progress import stage
from lrm_pl.rendering.density_grid import density_grid
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.occupancy import Occupancy
from lrm_pl.rendering.query import query_color, query_density
from lrm_pl.rendering.renderer import Renderer

#: Views, their side in pixels, and their elevations, that are asked how dense the surface is.
_LOOKS, _LOOK_SIDE, _LOOK_ELEVATIONS_DEG = 4, 48, (-20.0, 20.0)


class NoSurfaceError(InputError):
    """The density is on one side of the threshold everywhere."""


@torch.no_grad()
def extract_mesh(
    field: Field,
    index: int,
    threshold: float,
    resolution: int = 384,
    *,
    bounds: Bounds = "box",
    floaters: float = 0.0,
    most_faces: int | None = None,
) -> Mesh:
    """Cut the surface of one object out of its density.

    Args:
        field: The fields.
        index: Which object.
        threshold: Density at the surface (OpenLRM: 3 a scene unit; TripoSR: 25 a chord).
        resolution: Points of the lattice along each axis (LRM: 384).
        bounds: What the renderer draws: beyond it the field was never trained, and nothing is taken to be there.
        floaters: Parts of less than this share of the largest part's area are left out.
        most_faces: Faces that may stay; None keeps all.

    Raises:
        NoSurfaceError: There is no surface at this threshold, or none of so few faces.
    """
    with stage("grid"):
        density = density_grid(field, index, resolution, threshold).density.cpu()
    if bounds == "sphere":
        axis = torch.linspace(-1, 1, resolution).square()
        density[axis[:, None, None] + axis[:, None] + axis > 1] = 0
    _require_both_sides(density, threshold)
    for dim in range(3):  # what reaches a face of the box is closed there, just inside of it
        density.select(dim, 0).zero_()
        density.select(dim, -1).zero_()
    _require_both_sides(density, threshold)
    inside = density > threshold
    with stage("marching cubes"):
        vertices, faces = _cut(density, inside, threshold)
    if floaters:
        with stage("floaters"):
            vertices, faces = without_floaters(vertices, faces, floaters)
    if most_faces is not None:
        with stage("decimation"):
            vertices, faces = decimated(vertices, faces, most_faces)
    if not len(faces):
        raise NoSurfaceError(
            expected=f"a surface of at most {most_faces} faces",
            found="that none would be left",
            remedy="allow more",
        )
    with stage("colors"):
        return Mesh(vertices, faces, colors_at(field, index, vertices))


def _require_both_sides(density: Tensor, threshold: float) -> None:
    low, high = float(density.min()), float(density.max())
    if not low <= threshold < high:
        raise NoSurfaceError(
            expected=f"densities on both sides of {threshold:g}",
            found=f"{low:.3g} to {high:.3g}: there is no surface",
            remedy="choose a threshold between, or train longer",
        )


def _cut(density: Tensor, inside: Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    low, high = _bounds(inside)
    part = density[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    places, faces, _, _ = marching_cubes(part.numpy(), threshold, gradient_direction="ascent")
    vertices = (places + np.array(low)) * (2 / (len(density) - 1)) - 1
    return vertices.astype(np.float32), faces.astype(np.int64)


@torch.no_grad()
def colors_at(field: Field, index: int, points: Float[np.ndarray, "Q 3"]) -> Float[np.ndarray, "Q 3"]:
    """Return the colors of one object at points, sRGB in [0, 1]."""
    places = torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32)).to(field.planes.device)
    return query_color(field, index, places).float().clamp(0, 1).cpu().numpy()


@torch.no_grad()
def surface_density(
    field: Field,
    index: int,
    renderer: Renderer,
    occupancy: Occupancy,
    distance: float,
    fxfycxcy: Float[Tensor, "4"],
) -> float:
    """Find the density at the surface that images show: the threshold that suits this object.

    Where a ray's light comes from on average lies inside what is seen, and the density there depends on how sharp the
    model's edges are, which no constant knows. Here it is the median over a few views, of where opaque rays end.

    Args:
        field: The fields.
        index: Which object.
        renderer: The renderer that the network was trained with.
        occupancy: The occupied cells of the object.
        distance: Of the views.
        fxfycxcy: Their intrinsics.

    Raises:
        NoSurfaceError: No view shows anything opaque.
    """
    device = field.planes.device
    poses = torch.cat([orbit(_LOOKS, distance, elevation) for elevation in _LOOK_ELEVATIONS_DEG])
    c2w, cameras = poses.to(device)[None], fxfycxcy.to(device).expand(1, len(poses), 4)
    size = (_LOOK_SIDE, _LOOK_SIDE)
    seen = renderer.draw(field, [occupancy], c2w, cameras, size)
    origins, directions, _, _ = renderer.rays(c2w, cameras, size)
    opaque = (seen.opacity.flatten() > 0.5).nonzero().squeeze(-1)
    if not len(opaque):
        density = density_grid(field, index, 64).density
        raise NoSurfaceError(
            expected="an object",
            found=(
                f"that no view shows anything opaque: densities are from {density.min():.3g} to "
                f"{density.max():.3g}"
            ),
            remedy="choose a threshold between, or train longer",
        )
    t = seen.depth.flatten()[opaque, None]
    points = origins.flatten(0, 1)[opaque] + t * directions.flatten(0, 1)[opaque]
    return float(query_density(field, index, points).median())


def _bounds(inside: Tensor) -> tuple[list[int], list[int]]:
    """Find the part of the lattice that holds all of the surface: marching cubes then passes over nothing else."""
    low, high = [], []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        filled = inside.any(dim=others[1]).any(dim=others[0]).nonzero()
        low.append(max(0, int(filled.min()) - 1))
        high.append(min(inside.shape[axis], int(filled.max()) + 2))
    return low, high
