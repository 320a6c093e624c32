"""Bake colors that are known everywhere (a field's) into an image over a mesh."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import distance_transform_edt

from lrm_pl.meshing.mesh import Mesh, Texture
from lrm_pl.meshing.unwrap import Atlas, unwrap
from lrm_pl.progress import stage

#: Colors (Q, 3), sRGB in [0, 1], at points (Q, 3).
Color = Callable[[np.ndarray], np.ndarray]

#: Texels that are looked at at a time.
_CHUNK = 1 << 21


def textured(mesh: Mesh, color: Color, size: int = 1024, limit_s: float = 60.0) -> Mesh:
    """Give a mesh a texture.

    Args:
        mesh: The mesh; at seams its vertices are doubled.
        color: What colors are there.
        size: Side of the image, pixels; charts take what room they need: it comes out up to a half larger.
        limit_s: Seconds that laying it out may take.

    Raises:
        UnwrapError: It cannot be laid out in that time.
    """
    with stage("unwrapping"):
        atlas = unwrap(mesh.vertices, mesh.faces, size, limit_s)
    vertices = mesh.vertices[atlas.source]
    with stage("texture"):
        places, covered = texel_places(vertices, atlas)
        image = np.zeros(places.shape, dtype=np.float32)
        image[covered] = color(places[covered])
        image = _filled(image, covered)
    texture = Texture(atlas.uv, np.rint(image.clip(0, 1) * 255).astype(np.uint8))
    return dataclasses.replace(
        mesh, vertices=vertices, faces=atlas.faces, colors=mesh.colors[atlas.source], texture=texture
    )


def texel_places(
    vertices: Float[np.ndarray, "N 3"], atlas: Atlas
) -> tuple[Float[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"]]:
    """Find the point of the surface that each texel's center shows.

    Returns:
        Points, and whether there is one.
    """
    size = np.array(atlas.size)
    places = np.zeros((*atlas.size[::-1], 3), dtype=np.float32)
    covered = np.zeros(atlas.size[::-1], dtype=bool)
    corners = atlas.uv[atlas.faces].astype(np.float64) * size - 0.5  # (M, 3, 2) in texels; centers are whole
    low = np.floor(corners.min(axis=1)).clip(0, size - 1).astype(np.int64)
    high = np.ceil(corners.max(axis=1)).clip(0, size - 1).astype(np.int64)
    count = (high - low + 1).prod(axis=1)
    start = 0
    while start < len(count):
        stop = max(start + 1, int(np.searchsorted(np.cumsum(count[start:]), _CHUNK)) + start)
        _fill(places, covered, slice(start, stop), vertices, atlas.faces, corners, low, high)
        start = stop
    return places, covered


def _fill(
    places: np.ndarray,
    covered: np.ndarray,
    part: slice,
    vertices: np.ndarray,
    faces: Int[np.ndarray, "M 3"],
    corners: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> None:
    """Try each texel in the box around each face of a part."""
    wide = high[part] - low[part] + 1
    count = wide.prod(axis=1)
    face = np.repeat(np.arange(part.start, part.stop), count)
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    width = np.repeat(wide[:, 0], count)
    x, y = low[face, 0] + place % width, low[face, 1] + place // width
    a, ab, ac = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    twice_area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):  # faces without an area show nothing
        dx, dy = x - a[face, 0], y - a[face, 1]
        u = (dx * ac[face, 1] - dy * ac[face, 0]) / twice_area[face]
        v = (dy * ab[face, 0] - dx * ab[face, 1]) / twice_area[face]
        inside = (u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9)
    face, x, y, u, v = (values[inside] for values in (face, x, y, u, v))
    weights = np.stack([1 - u - v, u, v], axis=1)
    places[y, x] = (vertices[faces[face]] * weights[:, :, None]).sum(axis=1)
    covered[y, x] = True


def _filled(image: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Give every other texel the color of the nearest one that shows something: filters look over the edge."""
    rows, columns = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return image[rows, columns]
