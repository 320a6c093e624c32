"""Occupancy grid lookup on a CPU."""

import numpy as np
import numpy.typing as npt

from lrm_pl.kernels.compiled import compiled


@compiled()
def occupied(cells: npt.NDArray[np.bool_], points: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the indices of the points in occupied cells, in ascending order.

    A point outside the grid is assigned to the nearest cell.

    Args:
        cells: Occupancy grid of shape (n, n, n) over [-1, 1]^3.
        points: Points of shape (Q, 3).
    """
    size = cells.shape[0]
    numbers = np.empty(points.shape[0], dtype=np.int64)
    count = 0
    for q in range(points.shape[0]):
        x, y, z = points[q, 0], points[q, 1], points[q, 2]
        half = np.float32(size / 2)
        i = min(max(int((x + np.float32(1)) * half), 0), size - 1)
        j = min(max(int((y + np.float32(1)) * half), 0), size - 1)
        k = min(max(int((z + np.float32(1)) * half), 0), size - 1)
        if cells[i, j, k]:
            numbers[count] = q
            count += 1
    return numbers[:count]
