"""Conventions for shapes, cameras, the world and colors. This module imports only numpy.

Dimension letters in shape annotations
    B objects, V views per object, C channels, H W rows and columns, N image tokens, L triplane tokens (3 s^2),
    D transformer width, E camera embedding width, F plane channels, s / S plane side before / after upsampling,
    R rays, K samples per ray, Q query points. Per-ray scalars have no trailing dimension of size 1.

Camera
    Cameras have OpenCV axes, that is, +x right, +y down and +z forward. A pose ``c2w`` is a 4 x 4 float32
    camera-to-world matrix. Intrinsics ``fxfycxcy`` are divided by the image width (fx, cx) and height (fy, cy). The
    pixel in row i and column j is sampled at the center, ((j + 0.5) / W, (i + 0.5) / H).

World
    The world is right-handed with +z up, and lengths are in scene units. The radiance field covers [-1, 1]^3. Objects
    are scaled so that the bounding sphere about the center of the bounding box has radius 1 ("sphere"), or so that the
    longest side of the bounding box is 2 ("cube"). The manifest of the shards stores the normalization.
    ``t`` is the distance along a unit direction, ``depth`` is the expected t, and ``sigma`` is the density per scene
    unit.

Canonical frame
    The world is rotated about the origin so that the input camera is on the -y axis and looks along +y, with +z up. The
    distance of the camera does not change. The rotation removes the elevation of the camera, so +z is the up direction
    of the camera and may differ from the vertical direction of the scene.

Color
    Images are sRGB in [0, 1], with straight (not premultiplied) alpha on disk.

Names
    Names of angles end in _deg or _rad.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

Normalization = Literal["sphere", "cube"]

#: Orientation of the three planes of a triplane. Published weights determine it because the planes share the weights of
#: the deconvolution, so that a permutation of weights cannot flip a single plane.
PlaneLayout = Literal["lrm", "openlrm", "triposr"]

#: Column axis and row axis of each of the three planes, in channel order. The third plane of OpenLRM is (z, y). The
#: input camera of TripoSR is on +x instead of -y, so the x axis of TripoSR is -y, and the y axis of TripoSR is x.
PLANE_AXES: dict[PlaneLayout, tuple[tuple[int, int], ...]] = {
    "lrm": ((0, 1), (0, 2), (1, 2)),
    "openlrm": ((0, 1), (0, 2), (2, 1)),
    "triposr": ((1, 0), (1, 2), (0, 2)),
}

#: Planes in which the column index decreases along the column axis.
MIRRORED_PLANES: dict[PlaneLayout, tuple[int, ...]] = {"lrm": (), "openlrm": (), "triposr": (0, 1)}

#: Blender and OpenGL cameras look along -z with +y up, and OpenCV cameras look along +z with +y down.
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0]).astype(np.float32)

#: Maximum deviation of a pose from a rigid transformation (see ``rigid_error``).
RIGID_TOLERANCE = 1e-4


def opengl_to_opencv(c2w: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Convert OpenGL or Blender poses to OpenCV poses.

    The conversion is its own inverse.

    Args:
        c2w: Poses of shape (..., 4, 4) of cameras that look along -z with +y up.

    Returns:
        Poses of the same cameras, which look along +z with +y down.
    """
    return c2w @ OPENGL_TO_OPENCV


def rigid_error(c2w: npt.NDArray[np.float32]) -> float:
    """Return the deviation of poses from rigid transformations.

    Args:
        c2w: Poses of shape (..., 4, 4).

    Returns:
        Maximum absolute deviation of R^T R from the identity, of det R from 1, and of the last row from 0 0 0 1. The
        deviation is infinite if an element is not finite.
    """
    pose = np.asarray(c2w, dtype=np.float64)
    if not np.isfinite(pose).all():
        return float("inf")
    rotation = pose[..., :3, :3]
    orthonormal = np.abs(rotation.swapaxes(-1, -2) @ rotation - np.eye(3)).max()
    proper = np.abs(np.linalg.det(rotation) - 1).max()
    last_row = np.abs(pose[..., 3, :] - np.array([0.0, 0.0, 0.0, 1.0])).max()
    return float(max(orthonormal, proper, last_row))
