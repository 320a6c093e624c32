"""Camera rays and their intersection with the bounds of the field.

All functions are pure and compute in float32.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

#: Region that contains the object, the unit sphere (for sphere-normalized data) or the box [-1, 1]^3.
Bounds = Literal["sphere", "box"]


def pixel_rays(
    c2w: Float[Tensor, "*batch 4 4"], fxfycxcy: Float[Tensor, "*batch 4"], height: int, width: int
) -> tuple[Float[Tensor, "*batch H W 3"], Float[Tensor, "*batch H W 3"]]:
    """Return the rays through the centers of all pixels.

    Args:
        c2w: OpenCV poses.
        fxfycxcy: Normalized intrinsics.
        height: Number H of pixel rows.
        width: Number W of pixel columns.

    Returns:
        Origins and unit directions in world space, both of shape (..., H, W, 3).
    """
    rows = (torch.arange(height, dtype=torch.float32, device=c2w.device) + 0.5) / height
    columns = (torch.arange(width, dtype=torch.float32, device=c2w.device) + 0.5) / width
    fx, fy, cx, cy = (number[..., None, None, None] for number in fxfycxcy.float().unbind(dim=-1))
    x = (columns[None, :, None] - cx) / fx  # (..., 1, W, 1)
    y = (rows[:, None, None] - cy) / fy  # (..., H, 1, 1)
    right, down, forward, center = (
        column[..., None, None, :] for column in c2w[..., :3, :].float().unbind(-1)
    )
    directions = x * right + y * down + forward
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return center.expand_as(directions), directions


def ray_interval(
    origins: Float[Tensor, "*rays 3"], directions: Float[Tensor, "*rays 3"], bounds: Bounds
) -> tuple[Float[Tensor, "*rays"], Float[Tensor, "*rays"]]:
    """Intersect rays with the bounds.

    Args:
        origins: Ray origins of shape (..., 3).
        directions: Unit directions of shape (..., 3).
        bounds: The unit sphere or the box [-1, 1]^3.

    Returns:
        Non-negative distances ``near`` and ``far`` along each ray, which are equal if the ray misses the bounds.
    """
    if bounds == "sphere":
        middle = -(origins * directions).sum(dim=-1)
        closest = origins + middle.unsqueeze(-1) * directions  # more accurate than |o|^2 - middle^2
        half = (1 - closest.square().sum(dim=-1)).clamp_min(0).sqrt()
        near, far = middle - half, middle + half
    else:
        # If a component of the direction is zero, the quotients are +-inf, which min and max handle correctly. If the
        # ray lies in a face, 0 * inf is NaN, and the ray has no limit along this axis.
        inverse = 1 / directions
        low, high = (-1 - origins) * inverse, (1 - origins) * inverse
        near = (
            torch.minimum(low, high).nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf).amax(-1)
        )
        far = torch.maximum(low, high).nan_to_num(nan=torch.inf, neginf=-torch.inf, posinf=torch.inf).amin(-1)
    near = near.clamp_min(0)
    return near, torch.maximum(near, far)
