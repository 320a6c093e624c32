"""Normalization of structure-from-motion cameras, after which +z is up and the object is inside the unit sphere.

Only the cameras and the outline of the object in each image are used. The camera distance divided by the size of the
object does not change.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from data_tools.layouts.files import LayoutError

#: Minimum ratio of the second and the first principal standard deviation of the right axes of the cameras. It
#: corresponds to an arc of about 20 degrees.
_LEAST_TURN = 0.1


@dataclasses.dataclass(frozen=True)
class ObjectOutline:
    """Outline of an object in an image, described by rays from the camera.

    Attributes:
        c2w: (4, 4) camera-to-world matrix in the OpenCV convention.
        rays: (N, 3) unit directions in world coordinates toward points on the outline.
        center: (3,) unit direction in world coordinates toward the center of the bounding box of the outline.
    """

    c2w: npt.NDArray[np.float64]
    rays: npt.NDArray[np.float64]
    center: npt.NDArray[np.float64]


def to_object_frame(outlines: list[ObjectOutline], where: str) -> npt.NDArray[np.float64]:
    """Transform the cameras to the coordinate system of the object.

    The origin is the point with the smallest sum of squared distances to the rays through the centers of the outlines.
    The unit of length is the radius of the smallest sphere around the origin that covers all outlines. The right axis
    of the first camera is +x, so this camera is on the -y side of the object.

    Args:
        outlines: Outlines of the object in V images from different viewpoints.
        where: Path for error messages.

    Returns:
        (V, 4, 4) camera-to-world matrices in the OpenCV convention.

    Raises:
        LayoutError: The cameras do not surround an object.
    """
    poses = np.stack([outline.c2w for outline in outlines])
    axes = _axes(poses, where)
    center = _nearest_point(poses[:, :3, 3], np.stack([outline.center for outline in outlines]))
    ahead = np.einsum("vi,vi->v", center - poses[:, :3, 3], poses[:, :3, 2])
    if (ahead <= 0).any():
        found = f"it behind camera {ahead.argmin()}"
        raise LayoutError("the object in front of every camera", found, subject=where)
    radius = max(float(_distances(center - s.c2w[:3, 3], s.rays).max()) for s in outlines)
    framed = poses.copy()
    framed[:, :3, :3] = axes @ poses[:, :3, :3]
    framed[:, :3, 3] = (poses[:, :3, 3] - center) @ axes.T / radius
    return framed


def _axes(poses: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.float64]:
    """Estimate the world axes +x, +y and +z, which are the rows of the returned matrix.

    The horizon is assumed to be level in all frames, so that the right axes of the cameras are parallel to the ground,
    regardless of the tilt. Unlike fitting a plane to the camera positions, this method also works for short
    camera arcs.
    """
    right, down = poses[:, :3, 0], poses[:, :3, 1]
    _, spread, directions = np.linalg.svd(right.T @ right)
    if spread[1] < _LEAST_TURN**2 * spread[0]:
        found = "cameras that look in one direction"
        raise LayoutError("cameras around the object", found, subject=where)
    up = -directions[2] * np.sign((down @ directions[2]).sum())
    x = right[0] - (right[0] @ up) * up
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(up, x), up])


def _nearest_point(
    origins: npt.NDArray[np.float64], directions: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the point with the smallest sum of squared distances to lines.

    Args:
        origins: (N, 3) points on the lines.
        directions: (N, 3) unit directions of the lines.
    """
    # Projections onto the planes perpendicular to the lines.
    across = np.eye(3) - directions[:, :, None] * directions[:, None, :]
    return np.linalg.lstsq(across.sum(axis=0), np.einsum("vij,vj->i", across, origins), rcond=None)[0]


def _distances(point: npt.NDArray[np.float64], rays: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the (N,) distances between a point and N rays through the origin."""
    return np.linalg.norm(point - (rays @ point)[:, None] * rays, axis=1)
