"""Make a mesh cleaner and smaller: without what floats beside it, with fewer faces."""

import fast_simplification
import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Vertices = Float[np.ndarray, "N 3"]
Faces = Int[np.ndarray, "M 3"]


def without_floaters(vertices: Vertices, faces: Faces, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Leave out connected parts that are small beside the largest one.

    Args:
        vertices: Places.
        faces: Numbers of vertices.
        share: Parts whose area is less than this share of the largest part's go; 0 keeps all.

    Returns:
        Vertices and faces of what stays, in their order.
    """
    joined = coo_array(
        (np.ones(2 * len(faces), dtype=bool), (faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel())),
        shape=(len(vertices), len(vertices)),
    )
    _, part = connected_components(joined, directed=False)
    corners = vertices[faces].astype(np.float64)
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    areas = np.bincount(part[faces[:, 0]], area, minlength=part.max() + 1)
    return _compact(vertices, faces[(areas >= share * areas.max())[part[faces[:, 0]]]])


def decimated(vertices: Vertices, faces: Faces, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Bring a mesh down to a number of faces by collapsing edges (quadric error; Garland and Heckbert 1997).

    Args:
        vertices: Places.
        faces: Numbers of vertices.
        most: Faces that may stay; a mesh that has no more stays as it is.
    """
    if len(faces) <= most:
        return vertices, faces
    points, triangles = fast_simplification.simplify(
        np.ascontiguousarray(vertices, dtype=np.float32),
        np.ascontiguousarray(faces, dtype=np.int32),
        target_count=most,
    )
    a, b, c = triangles.T
    return _compact(points, triangles[(a != b) & (b != c) & (c != a)])


def _compact(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop vertices of no face."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    number = np.cumsum(used) - 1
    return vertices[used].astype(np.float32), number[faces].astype(np.int64)
