"""Views from bytes to floats, on a CPU: contracts, plain twins, and which body serves.

``over_white`` gives a whole view; ``resized_window`` a window of the resized view, without the rest of it. Resizing is
of premultiplied colours, with pixel centres at + 0.5 and antialiased, so that intrinsics divided by the size stay true.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.kernels import views_numba

RGBA = UInt8[np.ndarray, "H W 4"]


def over_white(views: Sequence[RGBA]) -> tuple[Float[Tensor, "V 3 H W"], Float[Tensor, "V H W"]]:
    """Lay views of one size with straight alpha over white; the very bits of ``over_white_plain``.

    Returns:
        Colours and alpha, in [0, 1].

    Raises:
        ValueError: Views of several sizes.
    """
    height, width = views[0].shape[:2]
    if any(rgba.shape != (height, width, 4) for rgba in views):
        raise ValueError(f"expected views of one size, found {[rgba.shape for rgba in views]}")
    images = np.empty((len(views), 3, height, width), np.float32)
    alpha = np.empty((len(views), height, width), np.float32)
    for number, rgba in enumerate(views):
        views_numba.over_white(np.ascontiguousarray(rgba), images[number], alpha[number])
    return torch.from_numpy(images), torch.from_numpy(alpha)


def over_white_plain(views: Sequence[RGBA]) -> tuple[Float[Tensor, "V 3 H W"], Float[Tensor, "V H W"]]:
    """Compute ``over_white`` as written."""
    rgba = torch.stack([premultiplied(view) for view in views])
    return rgba[:, :3] + (1 - rgba[:, 3:]), rgba[:, 3]


def resized_window(rgba: RGBA, side: int, top: int, left: int, size: int) -> Float[Tensor, "4 size size"]:
    """Resize a view to ``side`` x ``side`` and cut out a window; within 3e-7 of ``resized_window_plain``.

    Args:
        rgba: The view, straight alpha.
        side: What it is resized to.
        top: First row of the window in the resized view.
        left: First column.
        size: Side of the window.

    Returns:
        Premultiplied colours and alpha, in [0, 1].
    """
    window = np.empty((4, size, size), np.float32)
    views_numba.resized_window(np.ascontiguousarray(rgba), side, top, left, window)
    return torch.from_numpy(window)


def resized_window_plain(
    rgba: RGBA, side: int, top: int, left: int, size: int
) -> Float[Tensor, "4 size size"]:
    """Compute ``resized_window`` as written."""
    return resize(premultiplied(rgba), side)[:, top : top + size, left : left + size]


def premultiplied(rgba: RGBA) -> Float[Tensor, "4 H W"]:
    """Return colours times alpha, and alpha, in [0, 1]: resizing straight alpha would bleed hidden colours."""
    view = torch.from_numpy(rgba).permute(2, 0, 1).float() / 255
    return torch.cat([view[:3] * view[3:], view[3:]])


def resize(image: Float[Tensor, "C H W"], side: int) -> Float[Tensor, "C side side"]:
    """Resize a whole picture."""
    if image.shape[-2:] == (side, side):
        return image
    resized = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)
