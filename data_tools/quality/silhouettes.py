"""Silhouette coherence test, which checks whether the silhouettes of all views could show the same object.

A ray through a pixel of the object intersects the object, and the intersection point projects into the silhouettes of
all other views. For each point on the ray, the maximum distance between the projection and the silhouettes is computed
in grid cells. The distance of the ray is the minimum over all points. If the cameras are correct, it is 0 except for
sampling errors (Hernandez, Schmitt and Cipolla, "Silhouette Coherence for Camera Calibration under Circular Motion",
PAMI 2007).

Coherence is necessary but not sufficient for correct cameras. For example, the views of a sphere are coherent in
any order. Therefore, the test is repeated with modified cameras to determine whether errors can be detected for the
object. The module requires only NumPy.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
MaskArray = npt.NDArray[np.bool_]

#: Distance to which larger distances are clipped, in cells.
_MAX_DISTANCE = 6

#: Maximum number of rays per view, number of points per ray, and maximum number of views to which a point is projected.
#: Three quarters of the rays are at the boundary of the silhouette.
_RAYS, _POINTS, _OTHER_VIEWS = 96, 96, 12

#: Half of the side length of the box that contains the object, which is [-1, 1]^3 with a margin.
_HALF_SIDE = 1.05

#: Minimum angle between two views that are swapped to test whether errors are detectable, and maximum number of pairs.
_MIN_ANGLE_DEG, _MAX_PAIRS = 30, 24

#: Minimum fraction of swapped pairs that must be detected.
_MIN_DETECTED = 0.95


@dataclasses.dataclass(frozen=True)
class CoherenceTolerance:
    """Resolution of the test, and tolerance for errors in masks and cameras.

    Attributes:
        cells: Maximum number of grid cells along each side of an image.
        tolerance: Maximum mean distance of the rays of a view with a correct camera, in cells.
    """

    cells: int
    tolerance: float


#: Tolerance for rendered views. The maximum distance for the 724 objects of the demo assets and of ``fetch
#: sweethome3d`` was 0.115, with 12 views and 8 samples per pixel.
RENDERED = CoherenceTolerance(128, 0.15)

#: Tolerance for video frames. It is larger, because the masks and poses are estimates.
FILMED = CoherenceTolerance(32, 0.4)


@dataclasses.dataclass(frozen=True)
class Silhouettes:
    """Silhouettes of the V views of an object.

    Attributes:
        distance: (V, cells, cells) distances to the nearest nonempty cell, in cells.
        pixels: V arrays of shape (R, 2) that contain the normalized image coordinates (x, y) of R pixels on the object.
        tolerance: Maximum mean distance of the rays of a view with a correct camera, in cells.
    """

    distance: FloatArray
    pixels: tuple[npt.NDArray[np.float64], ...]
    tolerance: float

    @property
    def cells(self) -> int:
        """Number of cells along each side of an image."""
        return self.distance.shape[1]


@dataclasses.dataclass(frozen=True)
class Coherence:
    """Result of the coherence test.

    Attributes:
        distances: (V,) mean distances of the rays of each view, in cells.
        undetectable: Camera errors that the silhouettes of the object do not reveal. If the test failed, this is empty.
    """

    distances: npt.NDArray[np.float64]
    undetectable: tuple[str, ...]


def make_silhouettes(alphas: Sequence[ByteArray], precision: CoherenceTolerance) -> Silhouettes:
    """Compute distance maps from masks, and sample pixels on the object.

    Args:
        alphas: V masks with shape (H, W) and values in [0, 255].
        precision: Resolution and tolerance of the test.
    """
    rng = np.random.default_rng(0)
    distances, pixels = [], []
    partial = any(((alpha > 0) & (alpha < 255)).any() for alpha in alphas)
    for alpha in alphas:
        side = min(precision.cells, *alpha.shape)
        seen, solid = _cells(alpha, side, edges=partial)
        distances.append(_distance(seen))
        inner = _all_neighbors(solid)
        # Opening removes lines thinner than three cells, which are not visible in all views.
        solid = _any_neighbor(inner)
        chosen = [
            rng.permutation(np.argwhere(where))[:count]
            for where, count in ((solid & ~inner, _RAYS * 3 // 4), (inner, _RAYS // 4))
        ]
        pixels.append((np.concatenate(chosen)[:, ::-1] + 0.5) / side)
    return Silhouettes(np.stack(distances), tuple(pixels), precision.tolerance)


def check_coherence(silhouettes: Silhouettes, c2w: FloatArray, fxfycxcy: FloatArray) -> Coherence:
    """Test whether cameras are consistent with silhouettes.

    If they are consistent, the function also tests whether swapped poses and incorrect focal lengths would be detected.

    Args:
        silhouettes: Silhouettes of V views.
        c2w: (V, 4, 4) camera-to-world matrices in the OpenCV convention.
        fxfycxcy: (V, 4) normalized intrinsics.
    """
    views, tolerance = np.arange(len(c2w)), silhouettes.tolerance
    distances = ray_distances(silhouettes, c2w, fxfycxcy, views, views)
    undetectable = []
    if distances.max() <= tolerance:
        swaps = _swapped_distances(silhouettes, c2w, fxfycxcy)
        if np.mean(swaps > tolerance) < _MIN_DETECTED:
            undetectable.append("swapped poses")
        zoomed = [fxfycxcy * np.array([zoom, zoom, 1, 1], dtype=np.float32) for zoom in (0.7, 1.3)]
        if any(ray_distances(silhouettes, c2w, k, views, views).max() <= tolerance for k in zoomed):
            undetectable.append("another focal length")
    return Coherence(distances, tuple(undetectable))


def _swapped_distances(
    silhouettes: Silhouettes, c2w: FloatArray, fxfycxcy: FloatArray
) -> npt.NDArray[np.float64]:
    """Swap the images of pairs of views, and return the larger distance of each pair.

    If there are no pairs, [0] is returned.
    """
    views = np.arange(len(c2w))
    forward = c2w[:, :3, 2].astype(np.float64)
    pairs = np.argwhere(np.triu(forward @ forward.T < np.cos(np.radians(_MIN_ANGLE_DEG)), 1))
    found = [0.0] if not len(pairs) else []
    for pair in np.random.default_rng(0).permutation(pairs)[:_MAX_PAIRS]:
        images = views.copy()
        images[pair] = pair[::-1]
        found.append(float(ray_distances(silhouettes, c2w, fxfycxcy, images, pair).max()))
    return np.array(found)


def ray_distances(
    silhouettes: Silhouettes,
    c2w: FloatArray,
    fxfycxcy: FloatArray,
    images: npt.NDArray[np.int64],
    views: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Compute the mean distance of the rays of each view.

    Args:
        silhouettes: Silhouettes of V views.
        c2w: (V, 4, 4) camera-to-world matrices in the OpenCV convention.
        fxfycxcy: (V, 4) normalized intrinsics.
        images: (V,) indices of the images that belong to the cameras.
        views: (N,) indices of the cameras to test.

    Returns:
        (N,) distances in cells. If the object is not visible in an image, the distance is 0.
    """
    # The maps are padded with zeros, because a point outside an image can be on the object.
    maps = np.pad(silhouettes.distance, ((0, 0), (1, 1), (1, 1)))
    count = len(c2w)
    steps = np.unique(np.linspace(1, count - 1, min(_OTHER_VIEWS, count - 1)).astype(np.int64))
    depths = (np.arange(_POINTS, dtype=np.float32) + 0.5) / _POINTS
    means = []
    for view in views:
        pixels = silhouettes.pixels[images[view]]
        local = np.column_stack([(pixels - fxfycxcy[view, 2:]) / fxfycxcy[view, :2], np.ones(len(pixels))])
        ray, origin = local @ c2w[view, :3, :3].T, c2w[view, :3, 3]
        near, far = _inside(origin, ray)
        t = (near[:, None] + (far - near)[:, None] * depths).astype(np.float32)
        worst = np.zeros_like(t)
        for other in (view + steps) % count:
            project = _projection(c2w[other], fxfycxcy[other], silhouettes)
            start = ((origin - c2w[other, :3, 3]) @ project).astype(np.float32)
            column, row, z = (
                first + t * slope[:, None]
                for first, slope in zip(start, (ray @ project).astype(np.float32).T, strict=True)
            )
            np.maximum(worst, _look_up(maps[images[other]], column, row, z), out=worst)
        best = worst.min(axis=1, initial=_MAX_DISTANCE)
        best[far <= near] = _MAX_DISTANCE
        means.append(float(best.mean()) if len(best) else 0.0)
    return np.array(means)


def uncovered_distances(
    silhouettes: Silhouettes,
    points: npt.NDArray[np.floating],
    c2w: FloatArray,
    fxfycxcy: FloatArray,
) -> npt.NDArray[np.float64]:
    """Compute the mean distance between the pixels of the object and the nearest projected surface point.

    Args:
        silhouettes: Silhouettes of V views.
        points: (N, 3) points on the surface of the object in world coordinates.
        c2w: (V, 4, 4) camera-to-world matrices in the OpenCV convention.
        fxfycxcy: (V, 4) normalized intrinsics.

    Returns:
        (V,) distances in cells. If the object is not visible in an image, the distance is 0.
    """
    cells = silhouettes.cells
    means = []
    for pose, camera, pixels in zip(c2w, fxfycxcy, silhouettes.pixels, strict=True):
        column, row, z = ((points - pose[:3, 3]) @ _projection(pose, camera, silhouettes)).T
        column, row = (np.floor(value / np.where(z > 1e-6, z, np.inf)) - 1 for value in (column, row))
        inside = (column >= 0) & (column < cells) & (row >= 0) & (row < cells) & (z > 1e-6)
        covered = np.zeros((cells, cells), dtype=bool)
        covered[row[inside].astype(int), column[inside].astype(int)] = True
        x, y = (pixels.T * cells).astype(int)
        means.append(float(_distance(covered)[y, x].mean()) if len(pixels) else 0.0)
    return np.array(means)


def _projection(pose: FloatArray, camera: FloatArray, silhouettes: Silhouettes) -> npt.NDArray[np.float64]:
    """Return the matrix that maps world directions to homogeneous coordinates in the padded maps."""
    fx, fy, cx, cy = camera.astype(np.float64) * silhouettes.cells
    return pose[:3, :3] @ np.array([[fx, 0, 0], [0, fy, 0], [cx + 1, cy + 1, 1]])


def _look_up(
    padded: FloatArray,
    column: npt.NDArray[np.floating],
    row: npt.NDArray[np.floating],
    z: npt.NDArray[np.floating],
) -> FloatArray:
    """Look up distances at homogeneous coordinates. Points behind the camera have the distance ``_MAX_DISTANCE``."""
    behind = z < 1e-6
    scale = 1 / np.where(behind, 1, z)
    last = len(padded) - 1
    index = (row * scale).clip(0, last).astype(np.int32) * len(padded)
    index += (column * scale).clip(0, last).astype(np.int32)
    distance = padded.ravel()[index]
    distance[behind] = _MAX_DISTANCE
    return distance


def _inside(
    origin: npt.NDArray[np.floating], rays: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Compute the intersections of rays with the box that contains the object.

    Args:
        origin: (3,) origin of the rays.
        rays: (N, 3) directions of the rays.

    Returns:
        Ray parameters of the first and the second intersection, shape (N,). If a ray does not intersect the box, the
        second parameter is not larger than the first.
    """
    rays = np.where(np.abs(rays) < 1e-12, 1e-12, rays)
    ends = (np.array([[-_HALF_SIDE], [_HALF_SIDE]]) - origin)[:, None] / rays
    return np.maximum(ends.min(axis=0).max(axis=1), 1e-3), ends.max(axis=0).min(axis=1)


def _cells(alpha: ByteArray, side: int, *, edges: bool) -> tuple[MaskArray, MaskArray]:
    """Reduce a mask to a grid of cells.

    Args:
        alpha: (H, W) mask with values in [0, 255].
        side: Number of cells along each side.
        edges: Whether the mask is antialiased. If it is binary, pixels next to the object are treated as part of the
            object, because they can be partly covered.

    Returns:
        Two masks with shape (side, side), which mark the nonempty cells and the cells that are at least half covered.
    """
    rows, columns = (np.linspace(0, size, side + 1).astype(int)[:-1] for size in alpha.shape)

    def reduce(ufunc: np.ufunc, values: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        return ufunc.reduceat(ufunc.reduceat(values, rows, axis=0), columns, axis=1)

    shown = alpha > 0
    if not edges:
        padded = np.pad(shown, 1)
        shown = shown | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    area = np.outer(np.diff([*rows, alpha.shape[0]]), np.diff([*columns, alpha.shape[1]]))
    solid = reduce(np.add, alpha.astype(np.int64)) > 127 * area
    return reduce(np.logical_or, shown).astype(bool), solid


def _any_neighbor(cells: MaskArray) -> MaskArray:
    """Dilate a mask by one cell, including diagonal neighbors."""
    padded = np.pad(cells, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _all_neighbors(cells: MaskArray) -> MaskArray:
    """Erode a mask by one cell, including diagonal neighbors."""
    return ~_any_neighbor(~cells)


def _distance(seen: MaskArray) -> FloatArray:
    """Return the distance of each cell to the nearest nonempty cell, clipped to ``_MAX_DISTANCE``.

    The squared distance is separable, so the minimum is computed along one axis and then along the second axis.
    """
    far, size = _MAX_DISTANCE, len(seen)
    squared = np.where(seen, 0, far**2)
    for _ in range(2):
        padded = np.pad(squared, ((far, far), (0, 0)), constant_values=far**2)
        steps = [padded[far + step : far + step + size] + step**2 for step in range(-far, far + 1)]
        squared = np.min(steps, axis=0).T
    return np.sqrt(np.minimum(squared, far**2)).astype(np.float32)
