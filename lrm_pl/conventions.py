"""Conventions for shapes, cameras, world and colors. numpy only.

Dimension letters (used in every shape annotation)
    B objects, V views per object, C channels, H W rows and columns, N image tokens, L triplane tokens = 3 s s,
    D transformer width, E camera embedding width, F plane channels, s / S plane side before / after upsampling,
    R rays, K samples per ray, Q query points. Per-ray scalars have no trailing dimension of size 1.

Camera
    OpenCV axes: +x right, +y down, +z forward. A pose is ``c2w``, camera to world, 4x4, float32.
    Intrinsics are ``fxfycxcy``, divided by image width (fx, cx) and height (fy, cy).
    Pixel (row i, column j) is sampled at its center: ((j + 0.5) / W, (i + 0.5) / H).

World
    Right-handed, +z up, lengths in scene units. The field covers [-1, 1]^3. Objects are scaled so that the bounding
    sphere about the center of the bounding box has radius 1 ("sphere"), or so that the longest side is 2 ("cube");
    the manifest of the shards stores which.
    ``t`` is the distance along a unit direction, ``depth`` the expected t, ``sigma`` the density per scene unit.

Canonical frame
    The world is rotated about the origin so that the input camera is on -y, looks along +y and has +z up; its distance
    d is unchanged. This removes elevation: +z is the input camera's up direction, not that of gravity.

Color
    Images are sRGB in [0, 1], with straight (not premultiplied) alpha on disk. Names of angles end in _deg or _rad.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

Normalization = Literal["sphere", "cube"]

#: Orientation of the three planes of a triplane. It is fixed by published weights: the deconvolution is shared by the
#: planes, so permuting weights cannot flip a single plane.
PlaneLayout = Literal["lrm", "openlrm", "triposr"]

#: Axis pairs (column axis, row axis) of the three planes, in channel order. OpenLRM's third plane is (z, y). TripoSR's
#: input camera is on +x instead of -y: its x axis is -y, its y axis x.
PLANE_AXES: dict[PlaneLayout, tuple[tuple[int, int], ...]] = {
    "lrm": ((0, 1), (0, 2), (1, 2)),
    "openlrm": ((0, 1), (0, 2), (2, 1)),
    "triposr": ((1, 0), (1, 2), (0, 2)),
}

#: Planes whose columns run opposite to their axis.
MIRRORED_PLANES: dict[PlaneLayout, tuple[int, ...]] = {"lrm": (), "openlrm": (), "triposr": (0, 1)}

#: Blender and OpenGL cameras look along -z with +y up; OpenCV's along +z with +y down.
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0]).astype(np.float32)

#: Maximum deviation of a pose from rigid; see ``rigid_error``.
RIGID_TOLERANCE = 1e-4


def opengl_to_opencv(c2w: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Convert OpenGL and Blender poses to OpenCV poses, or back.

    Args:
        c2w: (..., 4, 4) poses whose camera looks along -z with +y up.

    Returns:
        (..., 4, 4) poses of the same cameras with +z forward and +y down.
    """
    return c2w @ OPENGL_TO_OPENCV


def rigid_error(c2w: npt.NDArray[np.float32]) -> float:
    """Return the deviation of poses from rigid transformations; 0 for a rotation and translation.

    Args:
        c2w: (..., 4, 4) poses.

    Returns:
        The largest absolute deviation of R^T R from the identity, of det R from 1, and of the last row from
        0 0 0 1; infinity if an element is not finite.
    """
    pose = np.asarray(c2w, dtype=np.float64)
    if not np.isfinite(pose).all():
        return float("inf")
    rotation = pose[..., :3, :3]
    orthonormal = np.abs(rotation.swapaxes(-1, -2) @ rotation - np.eye(3)).max()
    proper = np.abs(np.linalg.det(rotation) - 1).max()
    last_row = np.abs(pose[..., 3, :] - np.array([0.0, 0.0, 0.0, 1.0])).max()
    return float(max(orthonormal, proper, last_row))
