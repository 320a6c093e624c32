"""Texture baking, which samples the colors of a field at the texels of a texture map."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import distance_transform_edt

from lrm_pl.meshing.mesh import Mesh, Texture
from lrm_pl.meshing.unwrap import Atlas, unwrap
from lrm_pl.progress import stage

#: Function from points (Q, 3) to sRGB colors (Q, 3) in [0, 1].
Color = Callable[[np.ndarray], np.ndarray]

#: Approximate number of texels that are rasterized at a time.
_CHUNK = 1 << 21


def bake_texture(mesh: Mesh, color: Color, size: int, limit_s: float = 60.0) -> Mesh:
    """Unwrap a mesh, and bake a texture map.

    Vertices at seams are duplicated.

    Args:
        mesh: Mesh without a texture.
        color: Function that maps points to colors.
        size: Target side length of the texture in pixels. The packed atlas may be up to 1.5 times as large.
        limit_s: Time limit for UV unwrapping in seconds.

    Raises:
        UnwrapError: Unwrapping failed or timed out.
    """
    with stage("unwrapping"):
        atlas = unwrap(mesh.vertices, mesh.faces, size, limit_s)
    vertices = mesh.vertices[atlas.source]
    with stage("texture"):
        points, covered = texel_points(vertices, atlas)
        image = np.zeros(points.shape, dtype=np.float32)
        image[covered] = color(points[covered])
        image = _dilate(image, covered)
    texture = Texture(atlas.uv, np.rint(image.clip(0, 1) * 255).astype(np.uint8))
    return dataclasses.replace(
        mesh, vertices=vertices, faces=atlas.faces, colors=mesh.colors[atlas.source], texture=texture
    )


def texel_points(
    vertices: Float[np.ndarray, "N 3"], atlas: Atlas
) -> tuple[Float[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"]]:
    """Return the surface point at the center of each texel.

    Returns:
        Points, and a mask of the texels that are covered by a face. The points of other texels are zero.
    """
    size = np.array(atlas.size)
    points = np.zeros((*atlas.size[::-1], 3), dtype=np.float32)
    covered = np.zeros(atlas.size[::-1], dtype=bool)
    corners = (
        atlas.uv[atlas.faces].astype(np.float64) * size - 0.5
    )  # (M, 3, 2) in texels, with texel centers at integers
    low = np.floor(corners.min(axis=1)).clip(0, size - 1).astype(np.int64)
    high = np.ceil(corners.max(axis=1)).clip(0, size - 1).astype(np.int64)
    ends = np.cumsum((high - low + 1).prod(axis=1))
    batches = np.searchsorted(ends, np.arange(_CHUNK, ends[-1], _CHUNK))
    for batch in np.split(np.arange(len(ends)), batches):
        triangles = vertices[atlas.faces[batch]]
        _rasterize(points, covered, triangles, corners[batch], low[batch], high[batch])
    return points, covered


def _rasterize(
    points: np.ndarray,
    covered: np.ndarray,
    triangles: Float[np.ndarray, "M 3 3"],
    corners: Float[np.ndarray, "M 3 2"],
    low: Int[np.ndarray, "M 2"],
    high: Int[np.ndarray, "M 2"],
) -> None:
    """Rasterize faces by testing each texel in the bounding box of each face."""
    wide = high - low + 1
    count = wide.prod(axis=1)
    face = np.repeat(np.arange(len(count)), count)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    width = wide[face, 0]
    x, y = low[face, 0] + offset % width, low[face, 1] + offset // width
    a, ab, ac = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    twice_area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):  # faces of zero area cover no texel
        dx, dy = x - a[face, 0], y - a[face, 1]
        u = (dx * ac[face, 1] - dy * ac[face, 0]) / twice_area[face]
        v = (dy * ab[face, 0] - dx * ab[face, 1]) / twice_area[face]
        inside = (u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9)
    face, x, y, u, v = (values[inside] for values in (face, x, y, u, v))
    weights = np.stack([1 - u - v, u, v], axis=1)
    points[y, x] = (triangles[face] * weights[:, :, None]).sum(axis=1)
    covered[y, x] = True


def _dilate(image: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Fill uncovered texels with the color of the nearest covered texel, for correct filtering at chart borders."""
    rows, columns = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return image[rows, columns]
