"""CPU implementation of ``lrm_pl.kernels.views``, compiled with numba."""

import numpy as np
import numpy.typing as npt

from lrm_pl.kernels.compiled import compiled

_BYTE = np.float32(1 / 255)


@compiled()
def over_white(
    rgba: npt.NDArray[np.uint8], images: npt.NDArray[np.float32], alpha: npt.NDArray[np.float32]
) -> None:
    """Composite a view (H, W, 4) over white, and write the result to ``images`` (3, H, W) and ``alpha`` (H, W)."""
    one, byte = np.float32(1), np.float32(255)
    for y in range(rgba.shape[0]):
        row = rgba[y].reshape(-1)
        for x in range(rgba.shape[1]):
            alpha[y, x] = np.float32(row[4 * x + 3]) / byte
        for c in range(3):
            for x in range(rgba.shape[1]):
                images[c, y, x] = np.float32(row[4 * x + c]) / byte * alpha[y, x] + (one - alpha[y, x])


@compiled()
def resized_window(
    rgba: npt.NDArray[np.uint8], side: int, top: int, left: int, window: npt.NDArray[np.float32]
) -> None:
    """Resize a view to ``side`` x ``side``, and write premultiplied colors and alpha of a window of the result.

    Only pixels that contribute to the window are read.

    Args:
        rgba: View of shape (H, W, 4) with straight alpha.
        side: Side of the resized view in pixels.
        top: First row of the window in the resized view.
        left: First column of the window in the resized view.
        window: Buffer of shape (4, h, w) for the window.
    """
    height, width = window.shape[1], window.shape[2]
    y_first, y_weights = _taps(rgba.shape[0], side, top, height)
    x_first, x_weights = _taps(rgba.shape[1], side, left, width)
    x0, x1 = x_first[0], min(x_first[width - 1] + x_weights.shape[1], rgba.shape[1])
    y0, y1 = y_first[0], min(y_first[height - 1] + y_weights.shape[1], rgba.shape[0])
    across = x1 - x0
    # A row is stored channel by channel.
    source = np.empty((y1 - y0, 4 * across), dtype=np.float32)
    for y in range(y1 - y0):
        row, line = rgba[y0 + y, x0:x1].reshape(-1), source[y]
        alpha = line[3 * across :]
        for x in range(across):
            alpha[x] = np.float32(row[4 * x + 3]) * _BYTE
        for c in range(3):
            channel = line[c * across : (c + 1) * across]
            for x in range(across):
                channel[x] = np.float32(row[4 * x + c]) * _BYTE * alpha[x]
    sums, pixels = np.empty(4 * across, dtype=np.float32), np.empty((across, 4), dtype=np.float32)
    zero, one = np.float32(0), np.float32(1)
    for i in range(height):
        sums[:] = 0
        for k in range(min(y_weights.shape[1], y1 - y_first[i])):
            weight, line = y_weights[i, k], source[y_first[i] - y0 + k]
            if weight != 0:
                for x in range(sums.shape[0]):
                    sums[x] += weight * line[x]
        for x in range(across):  # interleaved, so that the four channels of a pixel are summed together
            for c in range(4):
                pixels[x, c] = sums[c * across + x]
        for j in range(width):
            r = g = b = a = zero
            start = x_first[j] - x0
            for k in range(min(x_weights.shape[1], across - start)):
                weight = x_weights[j, k]
                r += weight * pixels[start + k, 0]
                g += weight * pixels[start + k, 1]
                b += weight * pixels[start + k, 2]
                a += weight * pixels[start + k, 3]
            window[0, i, j] = min(max(r, zero), one)
            window[1, i, j] = min(max(g, zero), one)
            window[2, i, j] = min(max(b, zero), one)
            window[3, i, j] = min(max(a, zero), one)


@compiled()
def _taps(
    size: int, resized: int, start: int, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the first source pixel and the filter weights for ``count`` resized pixels, starting at index ``start``.

    The filter is a triangle with a support of two resized pixels, or two source pixels if source pixels are larger.
    The computation uses float32, as in PyTorch.
    """
    half, one = np.float32(0.5), np.float32(1)
    scale = np.float32(size) / np.float32(resized)
    support = max(scale, one)
    inverse = one / support
    first = np.empty(count, dtype=np.int64)
    weights = np.zeros((count, int(np.ceil(support)) * 2 + 1), dtype=np.float32)
    for i in range(count):
        center = scale * (np.float32(start + i) + half)
        low = max(int(center - support + half), 0)
        taps = min(int(center + support + half), size) - low
        first[i] = low
        total = np.float32(0)
        for k in range(taps):
            away = abs((np.float32(k + low) - center + half) * inverse)
            weights[i, k] = max(one - away, np.float32(0))
            total += weights[i, k]
        for k in range(taps):
            weights[i, k] /= total
    return first, weights
