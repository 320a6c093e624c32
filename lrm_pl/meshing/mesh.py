"""What a mesh is."""

import dataclasses
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int, UInt8

#: Files that a mesh may be written as (``meshes.files``).
MeshFormat = Literal["glb", "obj", "ply", "stl"]
MESH_FORMATS: tuple[MeshFormat, ...] = get_args(MeshFormat)


@dataclasses.dataclass(frozen=True)
class Texture:
    """Colors of a surface as an image.

    Attributes:
        uv: (N, 2) place of each vertex in the image, from its left and top edge (0) to the right and bottom one (1).
        image: (H, W, 3) sRGB.
    """

    uv: Float[np.ndarray, "N 2"]
    image: UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """A surface.

    Attributes:
        vertices: (N, 3) in scene units.
        faces: (M, 3) numbers of vertices, counter-clockwise seen from outside.
        colors: (N, 3) sRGB in [0, 1].
        texture: Finer colors; None where the vertices' are all there is.
    """

    vertices: Float[np.ndarray, "N 3"]
    faces: Int[np.ndarray, "M 3"]
    colors: Float[np.ndarray, "N 3"]
    texture: Texture | None = None


def vertex_normals(
    vertices: Float[np.ndarray, "N 3"], faces: Int[np.ndarray, "M 3"]
) -> Float[np.ndarray, "N 3"]:
    """Return unit normals at the vertices: means over their faces, weighted by area; +z where these cancel out.

    Vertices of one place (those at the seams of a texture) share their faces, and have one normal.
    """
    _, welded = np.unique(vertices, axis=0, return_inverse=True)
    welded = welded.reshape(-1)
    corners = vertices.astype(np.float64)[faces]
    twice_area = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    total = np.stack(
        [
            np.bincount(welded[faces].ravel(), np.repeat(twice_area[:, axis], 3), minlength=len(vertices))
            for axis in range(3)
        ],
        axis=1,
    )
    length = np.linalg.norm(total, axis=1, keepdims=True)
    total[length[:, 0] == 0] = (0, 0, 1)
    return (total / np.where(length == 0, 1, length))[welded].astype(np.float32)
