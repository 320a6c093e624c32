"""Normalization of structure-from-motion cameras: +z up, the object in the unit sphere.

Only the cameras and the object's outline in each image are used. The ratio of camera distance to object size is
preserved.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from data_tools.layouts.files import LayoutError

#: Minimum spread of the cameras' right axes, relative to the maximum; about 20 degrees of arc.
_LEAST_TURN = 0.1


@dataclasses.dataclass(frozen=True)
class ObjectOutline:
    """The object's outline in one image, as rays.

    Attributes:
        c2w: (4, 4) OpenCV pose.
        rays: (N, 3) unit world directions to points of the outline.
        center: (3) unit world direction to the center of its bounding box.
    """

    c2w: npt.NDArray[np.float64]
    rays: npt.NDArray[np.float64]
    center: npt.NDArray[np.float64]


def to_object_frame(outlines: list[ObjectOutline], where: str) -> npt.NDArray[np.float64]:
    """Express the cameras in the object's frame.

    The origin is the point closest to the rays through the centers of the outlines. The unit of length is the radius of
    the smallest sphere about the origin that covers every outline. The first camera's right axis is +x, so this
    camera is on the -y side.

    Args:
        outlines: Outlines in V images from different sides.
        where: Path for messages.

    Returns:
        (V, 4, 4) OpenCV poses.

    Raises:
        LayoutError: The cameras do not surround an object.
    """
    poses = np.stack([outline.c2w for outline in outlines])
    axes = _axes(poses, where)
    center = _nearest_point(poses[:, :3, 3], np.stack([outline.center for outline in outlines]))
    ahead = np.einsum("vi,vi->v", center - poses[:, :3, 3], poses[:, :3, 2])
    if (ahead <= 0).any():
        raise LayoutError(
            subject=where,
            expected="the object in front of every camera",
            found=f"it behind camera {ahead.argmin()}",
        )
    radius = max(float(_distances(center - s.c2w[:3, 3], s.rays).max()) for s in outlines)
    framed = poses.copy()
    framed[:, :3, :3] = axes @ poses[:, :3, :3]
    framed[:, :3, 3] = (poses[:, :3, 3] - center) @ axes.T / radius
    return framed


def _axes(poses: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.float64]:
    """Estimate the world axes +x, +y and +z, as rows.

    The horizon is assumed to be level in videos, so the right axes of all cameras are parallel to the ground, for any
    tilt. This works for shorter arcs than a plane fitted to the camera positions.
    """
    right, down = poses[:, :3, 0], poses[:, :3, 1]
    _, spread, directions = np.linalg.svd(right.T @ right)
    if spread[1] < _LEAST_TURN**2 * spread[0]:
        raise LayoutError(
            subject=where,
            expected="cameras around the object",
            found="cameras that look in one direction",
        )
    up = -directions[2] * np.sign((down @ directions[2]).sum())
    x = right[0] - (right[0] @ up) * up
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(up, x), up])


def _nearest_point(
    origins: npt.NDArray[np.float64], directions: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the point with the smallest sum of squared distances to rays."""
    across = (
        np.eye(3) - directions[:, :, None] * directions[:, None, :]
    )  # projection onto the plane perpendicular to the ray
    return np.linalg.lstsq(across.sum(axis=0), np.einsum("vij,vj->i", across, origins), rcond=None)[0]


def _distances(point: npt.NDArray[np.float64], rays: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the distances of a point from rays through the origin."""
    return np.linalg.norm(point - (rays @ point)[:, None] * rays, axis=1)
