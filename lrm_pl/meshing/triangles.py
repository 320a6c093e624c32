"""Points drawn on triangles, uniformly by area. numpy only."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lrm_pl.errors import InputError

#: Vertices (n, 3) and the triangles (m, 3) between them.
Part = tuple[npt.NDArray[np.float64], npt.NDArray[np.integer]]


def draw_points(
    parts: Iterable[Part], count: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Draw points on a surface, independent of each other, uniformly by area.

    Returns:
        (count, 3) points and the (count, 3) unit normals of their triangles, by the order of the corners.

    Raises:
        InputError: The triangles have no area.
    """
    corners = np.concatenate([vertices[faces] for vertices, faces in parts])
    a, ab, ac = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    cross = np.cross(ab, ac)
    twice_area = np.linalg.norm(cross, axis=1)
    total = np.cumsum(twice_area)
    if not total[-1] > 0:
        raise InputError(expected="a surface", found="triangles without an area")
    chosen = np.searchsorted(total, rng.random(count) * total[-1], side="right")
    u, v = rng.random((2, count, 1))
    outside = u + v > 1  # the other half of the parallelogram
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    return a[chosen] + u * ab[chosen] + v * ac[chosen], cross[chosen] / twice_area[chosen, None]
