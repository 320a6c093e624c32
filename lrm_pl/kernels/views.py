"""Conversion of 8-bit RGBA views to floats, with compositing over white or with resizing and cropping.

``over_white`` converts whole views on any device. ``resized_window`` computes a window of a resized view on a CPU
without resizing the rest of the view. Resizing operates on premultiplied colors with antialiasing. Pixel centers are at
half-integers, so that resizing does not change the normalized intrinsics.
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.kernels import views_numba
from lrm_pl.kernels.device import on_cpu

RGBA = UInt8[np.ndarray, "H W 4"]


def over_white(rgba: UInt8[Tensor, "*B H W 4"]) -> tuple[Float[Tensor, "*B 3 H W"], Float[Tensor, "*B H W"]]:
    """Composite views with straight alpha over white.

    The result is bitwise equal to the result of ``over_white_plain``.

    Returns:
        Colors and alpha in [0, 1].
    """
    if not on_cpu(rgba):
        return over_white_plain(rgba)
    *several, height, width, _ = rgba.shape
    images, alpha = torch.empty(*several, 3, height, width), torch.empty(*several, height, width)
    flat = rgba.contiguous().view(-1, height, width, 4).numpy()
    colors, opacities = images.view(-1, 3, height, width).numpy(), alpha.view(-1, height, width).numpy()
    for view, color, opacity in zip(flat, colors, opacities, strict=True):
        views_numba.over_white(view, color, opacity)
    return images, alpha


def over_white_plain(
    rgba: UInt8[Tensor, "*B H W 4"],
) -> tuple[Float[Tensor, "*B 3 H W"], Float[Tensor, "*B H W"]]:
    """Compute ``over_white`` with PyTorch operators. This is the reference implementation."""
    # The divisor is a tensor because CUDA would multiply by the rounded reciprocal of a Python scalar.
    view = rgba.movedim(-1, -3).contiguous().float() / torch.full((), 255.0, device=rgba.device)
    colors, alpha = view[..., :3, :, :], view[..., 3:, :, :]
    return colors * alpha + (1 - alpha), alpha.squeeze(-3).contiguous()


def resized_window(rgba: RGBA, side: int, top: int, left: int, size: int) -> Float[Tensor, "4 size size"]:
    """Resize a view to ``side`` x ``side``, and crop a square window.

    The result differs from the result of ``resized_window_plain`` by at most 3e-7.

    Args:
        rgba: View with straight alpha.
        side: Side of the resized view in pixels.
        top: First row of the window in the resized view.
        left: First column of the window in the resized view.
        size: Side of the window in pixels.

    Returns:
        Premultiplied colors and alpha in [0, 1].
    """
    window = np.empty((4, size, size), np.float32)
    views_numba.resized_window(np.ascontiguousarray(rgba), side, top, left, window)
    return torch.from_numpy(window)


def resized_window_plain(
    rgba: RGBA, side: int, top: int, left: int, size: int
) -> Float[Tensor, "4 size size"]:
    """Compute ``resized_window`` with PyTorch operators. This is the reference implementation."""
    return resize(premultiplied(rgba), side)[:, top : top + size, left : left + size]


def premultiplied(rgba: RGBA) -> Float[Tensor, "4 H W"]:
    """Return premultiplied colors and alpha in [0, 1].

    Resizing premultiplied colors prevents the colors of transparent pixels from bleeding into other pixels.
    """
    view = torch.from_numpy(rgba).permute(2, 0, 1).float() / 255
    return torch.cat([view[:3] * view[3:], view[3:]])


def resize(image: Float[Tensor, "C H W"], side: int) -> Float[Tensor, "C side side"]:
    """Resize an image to a square with antialiased bilinear interpolation."""
    if image.shape[-2:] == (side, side):
        return image
    resized = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)
