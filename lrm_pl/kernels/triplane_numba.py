"""CPU implementation of triplane sampling with loops over points, compiled with numba.

Planes are stored channels last. The forward and backward passes are about ten times as fast as ``grid_sample`` on two
cores.

The functions run in the calling thread and release the GIL. To use several threads, give each thread its own points and
gradient buffer, as in ``lrm_pl.rendering.deferred``. The results are then bitwise reproducible.
"""

import numba
import numpy as np
import numpy.typing as npt

from lrm_pl.kernels.compiled import compiled

Floats = npt.NDArray[np.float32]


@numba.njit(inline="always", fastmath=False)  # type: ignore[untyped-decorator]
def _tap(position: np.float32, size: int) -> tuple[int, int, np.float32, np.float32]:
    """Return the two neighbors of a position in [-1, 1] and their weights.

    The weight of a neighbor outside the plane is 0.
    """
    x = np.float32(0.5) * ((position + np.float32(1)) * np.float32(size) - np.float32(1))
    x = min(max(x, np.float32(-2)), np.float32(size + 1))  # avoids integer overflow where all weights are 0
    low = int(np.floor(x))
    high_weight = x - np.float32(low)
    low_weight = np.float32(1) - high_weight
    high = low + 1
    if low < 0 or low >= size:
        low_weight = np.float32(0)
        low = 0
    if high < 0 or high >= size:
        high_weight = np.float32(0)
        high = 0
    return low, high, low_weight, high_weight


@compiled(fastmath={"contract", "reassoc", "nsz"})
def sample(planes: Floats, points: Floats, axes: npt.NDArray[np.int64], concat: bool, out: Floats) -> None:
    """Sample planes at the given points with bilinear interpolation.

    Args:
        planes: Planes of shape (P, S, S, C).
        points: Points of shape (Q, 3). Planes are zero outside of [-1, 1].
        axes: Column axis and row axis of each plane, of shape (P, 2).
        concat: Whether to concatenate the features of the planes instead of summing them.
        out: Buffer for the features, of shape (Q, C), or (Q, P C) if the features are concatenated. It is overwritten.
    """
    side, channels = planes.shape[1], planes.shape[3]
    for q in range(points.shape[0]):
        out[q, :] = 0
        for p in range(planes.shape[0]):
            x0, x1, wx0, wx1 = _tap(points[q, axes[p, 0]], side)
            y0, y1, wy0, wy1 = _tap(points[q, axes[p, 1]], side)
            w00, w01, w10, w11 = wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1
            offset = p * channels if concat else 0
            for c in range(channels):
                out[q, offset + c] += (
                    w00 * planes[p, y0, x0, c]
                    + w01 * planes[p, y0, x1, c]
                    + w10 * planes[p, y1, x0, c]
                    + w11 * planes[p, y1, x1, c]
                )


@compiled(fastmath={"contract", "reassoc", "nsz"})
def accumulate(
    grad_planes: Floats, points: Floats, axes: npt.NDArray[np.int64], concat: bool, grad: Floats
) -> None:
    """Add the gradient of ``sample`` with respect to the planes to ``grad_planes``.

    Args:
        grad_planes: Gradient of the planes, of shape (P, S, S, C), which is modified in place.
        points: Points of shape (Q, 3).
        axes: Column axis and row axis of each plane, of shape (P, 2).
        concat: Whether the features of the planes are concatenated instead of summed.
        grad: Gradient of the features, of shape (Q, C), or (Q, P C) if they are concatenated.
    """
    side, channels = grad_planes.shape[1], grad_planes.shape[3]
    for q in range(points.shape[0]):
        for p in range(grad_planes.shape[0]):
            x0, x1, wx0, wx1 = _tap(points[q, axes[p, 0]], side)
            y0, y1, wy0, wy1 = _tap(points[q, axes[p, 1]], side)
            w00, w01, w10, w11 = wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1
            offset = p * channels if concat else 0
            for c in range(channels):
                g = grad[q, offset + c]
                grad_planes[p, y0, x0, c] += w00 * g
                grad_planes[p, y0, x1, c] += w01 * g
                grad_planes[p, y1, x0, c] += w10 * g
                grad_planes[p, y1, x1, c] += w11 * g
