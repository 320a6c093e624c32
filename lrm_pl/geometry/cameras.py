"""Functions for camera poses, the canonical frame, intrinsics of crops, and the camera vector.

Poses ``c2w`` have shape (..., 4, 4), and intrinsics ``fxfycxcy`` have shape (..., 4). All functions compute in float32
even under autocast because they use element-wise products instead of matrix products.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.errors import InputError

#: Length of the camera vector.
CameraNumbers = Literal[20, 16]


def look_at(
    position: Float[Tensor, "*batch 3"], target: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> Float[Tensor, "*batch 4 4"]:
    """Return OpenCV poses at ``position`` that look at ``target`` with +z up.

    Args:
        position: Camera centers of shape (..., 3) in scene units, not directly above or below the target.
        target: Point through which the optical axes of the cameras pass.

    Raises:
        ValueError: A camera is at, directly above or directly below the target.
    """
    forward = torch.tensor(target, dtype=position.dtype, device=position.device) - position
    distance = forward.norm(dim=-1, keepdim=True)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=position.dtype, device=position.device).expand_as(forward)
    right = torch.linalg.cross(forward, up)
    if (right.norm(dim=-1, keepdim=True) <= 1e-6 * distance.clamp_min(1e-12)).any():
        raise ValueError(
            f"expected cameras that are not at, directly above or directly below the target {target}, but found the "
            f"camera positions {position.tolist()}"
        )
    forward = forward / distance
    right = right / right.norm(dim=-1, keepdim=True)
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward], dim=-1)
    top = torch.cat([rotation, position.unsqueeze(-1)], dim=-1)
    last = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=position.dtype, device=position.device)
    return torch.cat([top, last.expand(*top.shape[:-2], 1, 4)], dim=-2)


def orbit(frames: int, distance: float, elevation_deg: float = 15.0) -> Float[Tensor, "V 4 4"]:
    """Return poses on a circle about the z axis that look at the origin.

    The circle starts on the -y side and runs counterclockwise when viewed from above.

    Args:
        frames: Number of poses.
        distance: Distance of the cameras from the origin in scene units.
        elevation_deg: Elevation of the cameras in degrees.
    """
    azimuth = torch.arange(frames, dtype=torch.float32) * (2 * math.pi / frames) - math.pi / 2
    elevation = torch.full_like(azimuth, math.radians(elevation_deg))
    position = torch.stack(
        [azimuth.cos() * elevation.cos(), azimuth.sin() * elevation.cos(), elevation.sin()], dim=-1
    )
    return look_at(distance * position)


def canonical_pose(distance: float) -> Float[Tensor, "4 4"]:
    """Return the canonical pose, with the camera center at (0, -distance, 0), the optical axis along +y, and +z up."""
    return torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, -distance], [0, -1, 0, 0], [0, 0, 0, 1]])


def canonical_rotation(c2w: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 3 3"]:
    """Return the rotation of the world about the origin after which a camera looks along +y with +z up.

    A camera that looks at the origin from distance d is then at (0, -d, 0).
    """
    right, down, forward = c2w[..., :3, :3].unbind(-1)
    return torch.stack([right, forward, -down], dim=-2)


def canonicalize(c2w: Float[Tensor, "*batch V 4 4"]) -> Float[Tensor, "*batch V 4 4"]:
    """Rotate the world about the origin so that view 0, the input camera, is canonical (see ``conventions``)."""
    rotation = canonical_rotation(c2w[..., 0, :, :]).unsqueeze(-3)
    top = _matmul(rotation.expand(*c2w.shape[:-2], 3, 3), c2w[..., :3, :])
    return torch.cat([top, c2w[..., 3:, :]], dim=-2)


def resize_and_crop(
    fxfycxcy: Float[Tensor, "*batch 4"], size: tuple[int, int], windows: Float[Tensor, "*batch 4"]
) -> Float[Tensor, "*batch 4"]:
    """Return the normalized intrinsics of a crop.

    Resizing an image does not change its normalized intrinsics.

    Args:
        fxfycxcy: Normalized intrinsics of the full image.
        size: Height and width of the image before cropping, in pixels.
        windows: Top, left, height and width of the crops, in pixels.
    """
    (height, width), corner, crop = size, windows[..., :2].flip(-1), windows[..., 2:].flip(-1)
    scale = windows.new_tensor([width, height]) / crop
    return torch.cat([fxfycxcy[..., :2] * scale, fxfycxcy[..., 2:] * scale - corner / crop], dim=-1)


def camera_vector(
    c2w: Float[Tensor, "*batch 4 4"], fxfycxcy: Float[Tensor, "*batch 4"], numbers: CameraNumbers = 20
) -> Float[Tensor, "*batch numbers"]:
    """Return the camera vector that conditions the network.

    Args:
        c2w: Camera poses.
        fxfycxcy: Normalized intrinsics.
        numbers: Length of the vector. A vector of 20 elements contains the flattened pose and the intrinsics (LRM,
            section 3.2). A vector of 16 elements omits the last row of the pose (OpenLRM).
    """
    pose = c2w if numbers == 20 else c2w[..., :3, :]
    return torch.cat([pose.flatten(-2), fxfycxcy], dim=-1)


def _matmul(a: Float[Tensor, "*batch n k"], b: Float[Tensor, "*batch k m"]) -> Float[Tensor, "*batch n m"]:
    """Multiply small matrices with element-wise products because autocast would round a matrix product to bf16."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(dim=-2)


class PosedCamera(NamedTuple):
    """Camera of an image with known parameters.

    Attributes:
        c2w: Canonical pose.
        fxfycxcy: Normalized intrinsics.
    """

    c2w: Float[Tensor, "4 4"]
    fxfycxcy: Float[Tensor, "4"]


@dataclasses.dataclass(frozen=True)
class InputCamera:
    """Camera that is assumed for the input image.

    Models without camera conditioning do not use it.

    Attributes:
        distance: Distance from the origin in scene units (LRM and OpenLRM: 2).
        fov_deg: Field of view of the full image in degrees.
    """

    distance: float = 2.0
    fov_deg: float = 50.0

    def __post_init__(self) -> None:
        """Validate the distance and the field of view."""
        if not 0 < self.distance < math.inf or not 0 < self.fov_deg < 180:
            raise InputError(expected="distance above 0 and fov_deg between 0 and 180", found=self)

    @classmethod
    def like(cls, c2w: Float[Tensor, "4 4"], fxfycxcy: Float[Tensor, "4"]) -> "InputCamera":
        """Return the camera with the distance and horizontal field of view of a posed camera."""
        return cls(float(c2w[:3, 3].norm()), math.degrees(2 * math.atan(0.5 / float(fxfycxcy[0]))))

    @property
    def c2w(self) -> Float[Tensor, "4 4"]:
        """Canonical pose of the camera."""
        return canonical_pose(self.distance)

    @property
    def fxfycxcy(self) -> Float[Tensor, "4"]:
        """Normalized intrinsics of a square image."""
        focal = 0.5 / math.tan(math.radians(self.fov_deg / 2))
        return torch.tensor([focal, focal, 0.5, 0.5])
