"""Silhouette coherence: whether one object can have the silhouettes that all views show from their cameras.

A ray through a pixel of the object hits the object somewhere, and every other view must show the object at that point.
The distance of a ray is the smallest, over its points, of the largest distance to the silhouette in any other view, in
cells of an image: 0 for correct cameras, up to the sampling (Hernandez, Schmitt and Cipolla, "Silhouette Coherence for
Camera Calibration under Circular Motion", PAMI 2007). Coherence is necessary and not sufficient: a ball is coherent
with its poses in any order. Whether it decides is measured by the same test of altered cameras. numpy only.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: Distances are capped here, cells.
_MAX_DISTANCE = 6

#: Rays per view, three quarters of them along the silhouette; points per ray; other views that a ray is tested in.
_RAYS, _POINTS, _OTHER_VIEWS = 96, 96, 12

#: Half the side of the box that holds the object, [-1, 1]^3, with a margin.
_HALF_SIDE = 1.05

#: Test of altered cameras: views further apart than this, degrees, are swapped; at most so many pairs.
_MIN_ANGLE_DEG, _MAX_PAIRS = 30, 24

#: Fraction of the swaps that coherence must refuse, else it does not decide.
_REFUSED = 0.95


@dataclasses.dataclass(frozen=True)
class Precision:
    """How precise masks and cameras are.

    Attributes:
        cells: Cells along a side of an image, at most.
        tolerance: Mean distance of a view's rays up to which its camera is taken for correct, cells.
    """

    cells: int
    tolerance: float


#: Rendered views; the largest distance of 724 objects (demo, furniture; 12 views, 8 samples per pixel) was 0.115.
RENDERED = Precision(128, 0.15)

#: Video frames: masks and poses are estimates.
FILMED = Precision(32, 0.4)


@dataclasses.dataclass(frozen=True)
class Silhouettes:
    """Silhouettes of one object in V views.

    Attributes:
        distance: (V, cells, cells) distance to the nearest cell that shows anything, cells.
        pixels: V arrays (R, 2) of pixels (x, y) on the object, divided by the image's size.
    """

    distance: npt.NDArray[np.float32]
    pixels: tuple[npt.NDArray[np.float64], ...]

    @property
    def cells(self) -> int:
        """Cells along a side of an image."""
        return self.distance.shape[1]


@dataclasses.dataclass(frozen=True)
class Coherence:
    """Result of the test.

    Attributes:
        distances: (V) mean distance of each view's rays, cells.
        undetectable: Errors of the cameras that these silhouettes would not show; empty where the test failed.
    """

    distances: npt.NDArray[np.float64]
    undetectable: tuple[str, ...]


def make_silhouettes(alphas: Sequence[npt.NDArray[np.uint8]], cells: int) -> Silhouettes:
    """Compute distance maps, and choose pixels, from masks.

    Args:
        alphas: V masks (H, W), 0 to 255.
        cells: Cells along a side, at most.
    """
    rng = np.random.default_rng(0)
    distances, pixels = [], []
    partial = any(((alpha > 0) & (alpha < 255)).any() for alpha in alphas)
    for alpha in alphas:
        side = min(cells, *alpha.shape)
        seen, solid = _cells(alpha, side, edges=partial)
        distances.append(_distance(seen))
        inner = _all_neighbors(solid)
        solid = _any_neighbor(
            inner
        )  # without lines that are thinner than three cells: other views may miss them
        chosen = [
            rng.permutation(np.argwhere(where))[:count]
            for where, count in ((solid & ~inner, _RAYS * 3 // 4), (inner, _RAYS // 4))
        ]
        pixels.append((np.concatenate(chosen)[:, ::-1] + 0.5) / side)
    return Silhouettes(np.stack(distances), tuple(pixels))


def check_coherence(
    silhouettes: Silhouettes,
    c2w: npt.NDArray[np.float32],
    fxfycxcy: npt.NDArray[np.float32],
    tolerance: float,
) -> Coherence:
    """Test cameras against silhouettes and, where they pass, whether wrong ones would fail.

    Args:
        silhouettes: Of V views.
        c2w: (V, 4, 4) OpenCV poses.
        fxfycxcy: (V, 4) normalized intrinsics.
        tolerance: Mean distance of a view's rays up to which its camera is taken for correct, cells.
    """
    views = np.arange(len(c2w))
    distances = ray_distances(silhouettes, c2w, fxfycxcy, views, views)
    undetectable = []
    if distances.max() <= tolerance:
        swaps = _swapped_distances(silhouettes, c2w, fxfycxcy)
        if np.mean(swaps > tolerance) < _REFUSED:
            undetectable.append("swapped poses")
        zooms = [
            ray_distances(
                silhouettes, c2w, fxfycxcy * np.array([zoom, zoom, 1, 1], dtype=np.float32), views, views
            ).max()
            for zoom in (0.7, 1.3)
        ]
        if min(zooms) <= tolerance:
            undetectable.append("another focal length")
    return Coherence(distances, tuple(undetectable))


def _swapped_distances(
    silhouettes: Silhouettes, c2w: npt.NDArray[np.float32], fxfycxcy: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Return the larger distance of two views for each pair whose cameras are swapped; 0 where there is no pair."""
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
    c2w: npt.NDArray[np.float32],
    fxfycxcy: npt.NDArray[np.float32],
    images: npt.NDArray[np.int64],
    views: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Return the mean distance of the rays of views, cells.

    Args:
        silhouettes: Of V images.
        c2w: (V, 4, 4) OpenCV poses of V cameras.
        fxfycxcy: (V, 4) normalized intrinsics of V cameras.
        images: (V) index of each camera's image.
        views: (N) cameras whose rays are tested.

    Returns:
        (N) distances; 0 where an image shows no object.
    """
    maps = _padded(silhouettes)
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
    c2w: npt.NDArray[np.float32],
    fxfycxcy: npt.NDArray[np.float32],
) -> npt.NDArray[np.float64]:
    """Return the mean distance of each view's pixels on the object from the nearest projected point, cells.

    Args:
        silhouettes: Of V views.
        points: (N, 3) points that cover the surface of the object.
        c2w: (V, 4, 4) OpenCV poses.
        fxfycxcy: (V, 4) normalized intrinsics.

    Returns:
        (V) distances; 0 where an image shows no object.
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


def _padded(silhouettes: Silhouettes) -> npt.NDArray[np.float32]:
    """Add a border of zeros: a point outside an image may be on the object."""
    return np.pad(silhouettes.distance, ((0, 0), (1, 1), (1, 1)))


def _projection(
    pose: npt.NDArray[np.float32], camera: npt.NDArray[np.float32], silhouettes: Silhouettes
) -> npt.NDArray[np.float64]:
    """Return the matrix from directions in the world to (column z, row z, z) in the padded maps."""
    fx, fy, cx, cy = camera.astype(np.float64) * silhouettes.cells
    return pose[:3, :3] @ np.array([[fx, 0, 0], [0, fy, 0], [cx + 1, cy + 1, 1]])


def _look_up(
    padded: npt.NDArray[np.float32],
    column: npt.NDArray[np.floating],
    row: npt.NDArray[np.floating],
    z: npt.NDArray[np.floating],
) -> npt.NDArray[np.float32]:
    """Return the distance at homogeneous positions; points behind the camera are far."""
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
    """Return where rays enter and leave the box of the object; far <= near where they miss it."""
    rays = np.where(np.abs(rays) < 1e-12, 1e-12, rays)
    ends = (np.array([[-_HALF_SIDE], [_HALF_SIDE]]) - origin)[:, None] / rays
    return np.maximum(ends.min(axis=0).max(axis=1), 1e-3), ends.max(axis=0).min(axis=1)


def _cells(
    alpha: npt.NDArray[np.uint8], side: int, *, edges: bool
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Divide a mask into cells; return which show anything and which are mostly object.

    Args:
        alpha: (H, W) mask.
        side: Cells along a side.
        edges: Whether the mask has edge pixels that are partly covered; of a binary mask, pixels next to the object
            may be partly covered.
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


def _any_neighbor(cells: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Dilate a mask by one cell, diagonals included."""
    padded = np.pad(cells, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _all_neighbors(cells: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Erode a mask by one cell, diagonals included."""
    return ~_any_neighbor(~cells)


def _distance(seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Return the distance of each cell to the nearest seen one, capped: the minimum along columns, then along rows."""
    far, size = _MAX_DISTANCE, len(seen)
    squared = np.where(seen, 0, far**2)
    for _ in range(2):
        padded = np.pad(squared, ((far, far), (0, 0)), constant_values=far**2)
        steps = [padded[far + step : far + step + size] + step**2 for step in range(-far, far + 1)]
        squared = np.min(steps, axis=0).T
    return np.sqrt(np.minimum(squared, far**2)).astype(np.float32)
