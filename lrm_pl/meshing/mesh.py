"""Triangle meshes with vertex normals, floater removal and decimation."""

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8

#: File formats that ``meshing.export`` supports.
MeshFormat = Literal["glb", "obj", "ply", "stl"]
MESH_FORMATS: tuple[MeshFormat, ...] = get_args(MeshFormat)

Vertices = Float[np.ndarray, "N 3"]
Faces = Int[np.ndarray, "M 3"]


@dataclasses.dataclass(frozen=True)
class Texture:
    """Texture map of a mesh.

    Attributes:
        uv: Texture coordinates of the vertices, of shape (N, 2). They range from 0 at the left and top edges to 1 at
            the right and bottom edges.
        image: sRGB image of shape (H, W, 3).
    """

    uv: Float[np.ndarray, "N 2"]
    image: UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Triangle mesh.

    Attributes:
        vertices: Vertex positions of shape (N, 3) in scene units.
        faces: Vertex indices of shape (M, 3), counter-clockwise as seen from outside.
        colors: sRGB vertex colors of shape (N, 3) in [0, 1].
        texture: Texture map. If None, the mesh has only vertex colors.
    """

    vertices: Vertices
    faces: Faces
    colors: Float[np.ndarray, "N 3"]
    texture: Texture | None = None


def vertex_normals(vertices: Vertices, faces: Faces) -> Vertices:
    """Return unit vertex normals, which are area-weighted means of the normals of adjacent faces.

    Vertices at the same position, for example, at the seams of a texture, share one normal. If the normals of the
    adjacent faces cancel out, the vertex normal is +z.
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
    """Remove connected components that are small compared with the largest component.

    Args:
        vertices: Vertex positions.
        faces: Vertex indices.
        min_fraction: Minimum area of a component as a fraction of the area of the largest component.

    Returns:
        Remaining vertices and faces in their original order.
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
        max_faces: Maximum number of faces. A mesh that has at most this number of faces is returned unchanged.
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
    """Return the normals of faces, of shape (M, 3). The length of a normal is twice the area of the face."""
    corners = vertices[faces].astype(np.float64)
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _compact(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove vertices that are not part of any face."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    index = np.cumsum(used) - 1
    return vertices[used].astype(np.float32), index[faces].astype(np.int64)
