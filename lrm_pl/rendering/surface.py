"""From a field to a mesh: marching cubes (scikit-image's, Lewiner et al. 2003) and colours at the vertices."""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float, Int
from skimage.measure import marching_cubes
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.grid import density_grid
from lrm_pl.rendering.query import query_colour


class NoSurfaceError(InputError):
    """The density is on one side of the threshold everywhere."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """A surface.

    Attributes:
        vertices: (N, 3) in scene units.
        faces: (M, 3) numbers of vertices, counter-clockwise seen from outside.
        colours: (N, 3) sRGB in [0, 1].
    """

    vertices: Float[Tensor, "N 3"]
    faces: Int[Tensor, "M 3"]
    colours: Float[Tensor, "N 3"]


@torch.no_grad()
def extract_mesh(field: Field, index: int, threshold: float, resolution: int = 384) -> Mesh:
    """Cut the surface of one object out of its density.

    Args:
        field: The fields.
        index: Which object.
        threshold: Density at the surface (OpenLRM: 3 a scene unit; TripoSR: 25 a chord).
        resolution: Points of the lattice along each axis (LRM: 384).

    Raises:
        NoSurfaceError: There is no surface at this threshold.
    """
    density = density_grid(field, index, resolution, threshold).density.cpu()
    inside = density > threshold
    if not inside.any() or inside.all():
        raise NoSurfaceError(
            f"expected densities on both sides of {threshold:g}, found {density.min():.3g} to {density.max():.3g}: "
            "there is no surface; choose a threshold between, or train longer"
        )
    low, high = _bounds(inside)
    part = density[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    places, faces, _, _ = marching_cubes(part.numpy(), threshold, gradient_direction="ascent")
    vertices = torch.from_numpy(places + np.array(low, dtype=np.float32)) * (2 / (resolution - 1)) - 1
    vertices = vertices.float().to(field.planes.device)
    colours = query_colour(field, index, vertices).clamp(0, 1)
    return Mesh(vertices, torch.from_numpy(faces.astype(np.int64)).to(vertices.device), colours)


def _bounds(inside: Tensor) -> tuple[list[int], list[int]]:
    """Find the part of the lattice that holds all of the surface: marching cubes then passes over nothing else."""
    low, high = [], []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        filled = inside.any(dim=others[1]).any(dim=others[0]).nonzero()
        low.append(max(0, int(filled.min()) - 1))
        high.append(min(inside.shape[axis], int(filled.max()) + 2))
    return low, high
