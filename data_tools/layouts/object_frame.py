"""From the world of a video, of any orientation and scale, to ours: up is +z, the object fills the unit sphere.

Nothing is used but the cameras and the outlines of the object in each image. What stays as it was filmed: the ratio
of a camera's distance to the object's size.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from data_tools.layouts.files import LayoutError

#: How much the cameras' right axes must differ, of the most they can: an arc of some 20 degrees.
_LEAST_TURN = 0.1


@dataclasses.dataclass(frozen=True)
class ObjectOutline:
    """One camera's view of the object's outline.

    Attributes:
        c2w: (4, 4) pose, OpenCV.
        rays: (N, 3) unit directions, in the world, to points of the outline that reach its extremes.
        middle: (3) unit direction to its middle.
    """

    c2w: npt.NDArray[np.float64]
    rays: npt.NDArray[np.float64]
    middle: npt.NDArray[np.float64]


def to_object_frame(sightings: list[ObjectOutline], where: str) -> npt.NDArray[np.float64]:
    """Express the cameras in the object's frame.

    Its origin is the point nearest to all rays to the outlines' middles, its unit the radius of the least sphere about
    that point that covers every outline, and the first camera's right is its +x, so that this camera stands on -y.

    Args:
        sightings: V views of the object, from different sides.
        where: What messages call them.

    Returns:
        (V, 4, 4) OpenCV poses.

    Raises:
        LayoutError: The cameras do not go around an object.
    """
    poses = np.stack([sighting.c2w for sighting in sightings])
    axes = _axes(poses, where)
    center = _nearest_point(poses[:, :3, 3], np.stack([sighting.middle for sighting in sightings]))
    ahead = np.einsum("vi,vi->v", center - poses[:, :3, 3], poses[:, :3, 2])
    if (ahead <= 0).any():
        raise LayoutError(
            subject=where,
            expected="cameras that look at one object",
            found=f"none before camera {ahead.argmin()}",
        )
    radius = max(float(_distances(center - s.c2w[:3, 3], s.rays).max()) for s in sightings)
    framed = poses.copy()
    framed[:, :3, :3] = axes @ poses[:, :3, :3]
    framed[:, :3, 3] = (poses[:, :3, 3] - center) @ axes.T / radius
    return framed


def _axes(poses: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.float64]:
    """Find +x, +y, +z of our world, as rows.

    Who films keeps the horizon level: the cameras' right axes all lie in the ground's plane, however short the arc and
    however the camera is tilted. The plane through the places of the cameras would need a long arc of one height.
    """
    right, down = poses[:, :3, 0], poses[:, :3, 1]
    _, spread, directions = np.linalg.svd(right.T @ right)
    if spread[1] < _LEAST_TURN**2 * spread[0]:
        raise LayoutError(
            subject=where,
            expected="cameras that go around the object",
            found="that they look in one direction",
        )
    up = -directions[2] * np.sign((down @ directions[2]).sum())
    x = right[0] - (right[0] @ up) * up
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(up, x), up])


def _nearest_point(
    origins: npt.NDArray[np.float64], directions: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Find the point with the least sum of squared distances to rays."""
    across = np.eye(3) - directions[:, :, None] * directions[:, None, :]  # takes away what lies along the ray
    return np.linalg.lstsq(across.sum(axis=0), np.einsum("vij,vj->i", across, origins), rcond=None)[0]


def _distances(point: npt.NDArray[np.float64], rays: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Measure the distance of a point from rays out of the origin."""
    return np.linalg.norm(point - (rays @ point)[:, None] * rays, axis=1)
