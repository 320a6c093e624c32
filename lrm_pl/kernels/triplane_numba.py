"""CPU implementation of triplane sampling: numba loops over points, channels last.

Forward and backward are about ten times faster than ``grid_sample`` on two cores.

The functions run on the calling thread and release the GIL. To use several threads, give each its own points and its
own gradient buffer, as ``lrm_pl.rendering.deferred`` does; results are then bitwise reproducible.
"""

import numba
import numpy as np
import numpy.typing as npt

from lrm_pl.kernels.compiled import compiled

Floats = npt.NDArray[np.float32]


@numba.njit(inline="always", fastmath=False)  # type: ignore[untyped-decorator]
def _tap(position: np.float32, size: int) -> tuple[int, int, np.float32, np.float32]:
    """Return the two neighbors of a position in [-1, 1] and their weights; 0 for a neighbor outside."""
    x = np.float32(0.5) * ((position + np.float32(1)) * np.float32(size) - np.float32(1))
    x = min(max(x, np.float32(-2)), np.float32(size + 1))  # avoids integer overflow; the weights are 0
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
    """Write samples to ``out``: (Q, C), summed over planes, or (Q, P C), concatenated.

    Args:
        planes: (P, S, S, C).
        points: (Q, 3) in [-1, 1]; zero padding outside.
        axes: (P, 2) column axis and row axis of each plane.
        concat: Whether to concatenate instead of summing.
        out: Output; overwritten.
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
        grad_planes: (P, S, S, C), added to in place.
        points: (Q, 3).
        axes: (P, 2).
        concat: As in ``sample``.
        grad: (Q, C) or (Q, P C) gradient of the output.
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
