"""Triangle meshes: data structure, vertex normals, floater removal and decimation."""

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8

#: File formats of ``meshing.export``.
MeshFormat = Literal["glb", "obj", "ply", "stl"]
MESH_FORMATS: tuple[MeshFormat, ...] = get_args(MeshFormat)

Vertices = Float[np.ndarray, "N 3"]
Faces = Int[np.ndarray, "M 3"]


@dataclasses.dataclass(frozen=True)
class Texture:
    """Texture map of a mesh.

    Attributes:
        uv: (N, 2) texture coordinates of the vertices, from 0 at the left and top edge to 1 at the right and bottom.
        image: (H, W, 3) sRGB.
    """

    uv: Float[np.ndarray, "N 2"]
    image: UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangle mesh.

    Attributes:
        vertices: (N, 3) in scene units.
        faces: (M, 3) vertex indices, counter-clockwise seen from outside.
        colors: (N, 3) vertex colors, sRGB in [0, 1].
        texture: Texture map; None if the mesh has vertex colors only.
    """

    vertices: Vertices
    faces: Faces
    colors: Float[np.ndarray, "N 3"]
    texture: Texture | None = None


def vertex_normals(vertices: Vertices, faces: Faces) -> Vertices:
    """Return unit vertex normals: area-weighted means of the normals of adjacent faces; +z if these cancel out.

    Vertices at the same position, as at the seams of a texture, share one normal.
    """
    _, welded = np.unique(vertices, axis=0, return_inverse=True)
    welded = welded.reshape(-1)
    area_vectors = _area_vectors(vertices, faces)
    total = np.stack(
        [
            np.bincount(welded[faces].ravel(), np.repeat(area_vectors[:, axis], 3), minlength=len(vertices))
            for axis in range(3)
        ],
        axis=1,
    )
    length = np.linalg.norm(total, axis=1, keepdims=True)
    total[length[:, 0] == 0] = (0, 0, 1)
    return (total / np.where(length == 0, 1, length))[welded].astype(np.float32)


def remove_floaters(vertices: Vertices, faces: Faces, min_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Remove connected components that are small compared with the largest one.

    Args:
        vertices: Vertex positions.
        faces: Vertex indices.
        min_fraction: Components with less than this fraction of the largest component's area are removed.

    Returns:
        Remaining vertices and faces, in their original order.
    """
    from scipy.sparse import coo_array  # slow to import
    from scipy.sparse.csgraph import connected_components

    edges = coo_array(
        (np.ones(2 * len(faces), dtype=bool), (faces[:, [0, 1]].ravel(), faces[:, [1, 2]].ravel())),
        shape=(len(vertices), len(vertices)),
    )
    _, labels = connected_components(edges, directed=False)
    component = labels[faces[:, 0]]
    area = np.bincount(
        component, np.linalg.norm(_area_vectors(vertices, faces), axis=1), minlength=labels.max() + 1
    )
    return _compact(vertices, faces[(area >= min_fraction * area.max())[component]])


def decimate(vertices: Vertices, faces: Faces, max_faces: int) -> tuple[np.ndarray, np.ndarray]:
    """Reduce the number of faces by edge collapse with the quadric error metric (Garland and Heckbert 1997).

    Args:
        vertices: Vertex positions.
        faces: Vertex indices.
        max_faces: Maximum number of faces; a mesh with no more faces is returned unchanged.
    """
    if len(faces) <= max_faces:
        return vertices, faces
    import fast_simplification

    points, triangles = fast_simplification.simplify(
        np.ascontiguousarray(vertices, dtype=np.float32),
        np.ascontiguousarray(faces, dtype=np.int32),
        target_count=max_faces,
    )
    a, b, c = triangles.T
    return _compact(points, triangles[(a != b) & (b != c) & (c != a)])


def _area_vectors(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Return the (M, 3) normals of faces, with twice the faces' areas as lengths."""
    corners = vertices[faces].astype(np.float64)
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _compact(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove unused vertices."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    index = np.cumsum(used) - 1
    return vertices[used].astype(np.float32), index[faces].astype(np.int64)
