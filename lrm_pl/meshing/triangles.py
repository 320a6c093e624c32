"""Uniform sampling of points on triangle meshes.

This module imports only numpy, so it also runs in Blender.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lrm_pl.errors import InputError

#: Vertices (n, 3) and faces (m, 3).
TriangleMesh = tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]


def sample_surface(
    meshes: Iterable[TriangleMesh], count: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sample points on the surface of meshes, independently and uniformly by area.

    Args:
        meshes: Meshes that together form the surface.
        count: Number of points.
        rng: Random number generator.

    Returns:
        Points and unit normals of the triangles that contain them, both of shape (count, 3). The order of the corners
        of a triangle determines the sign of the normal.

    Raises:
        InputError: The total area of the triangles is zero.
    """
    corners = np.concatenate([vertices[faces] for vertices, faces in meshes])
    a, ab, ac = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    cross = np.cross(ab, ac)
    twice_area = np.linalg.norm(cross, axis=1)
    total = np.cumsum(twice_area)
    if not total[-1] > 0:
        raise InputError(expected="a surface", found="triangles with a total area of zero")
    chosen = np.searchsorted(total, rng.random(count) * total[-1], side="right")
    u, v = rng.random((2, count, 1))
    outside = u + v > 1  # these points are reflected into the triangle
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    return a[chosen] + u * ab[chosen] + v * ac[chosen], cross[chosen] / twice_area[chosen, None]
