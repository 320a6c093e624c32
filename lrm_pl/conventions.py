"""Write down, once, the conventions that every other file follows. numpy only.

Dimension letters (used in every shape annotation)
    B objects, V views an object, C channels, H W rows and columns, N image tokens, L triplane tokens = 3 s s,
    D transformer width, E camera-embedding width, F plane channels, s / S plane side before / after upsampling,
    R rays, K samples a ray, Q free query points. Scalars a ray carry no trailing 1.

Camera
    OpenCV axes: +x right, +y down, +z forward. A pose is ``c2w``, camera to world, 4x4, float32.
    Intrinsics are ``fxfycxcy``, four numbers divided by image width (fx, cx) and height (fy, cy).
    Pixel (row i, column j) is sampled at its center: ((j + 0.5) / W, (i + 0.5) / H).

World
    Right-handed, +z up, lengths in scene units, the field lives in [-1, 1]^3. An object is scaled so that the
    bounding SPHERE about the center of its bounding box has radius 1 ("sphere"), or so that its longest side is 2
    ("cube"); the manifest of the shards says which.
    ``t`` is the distance along a unit direction; ``depth`` is the expected t; ``sigma`` is density a scene unit.

Canonical frame
    Before the network sees an object, the world is rotated about the ORIGIN until the input camera stands on -y,
    looks along +y, and its up is +z; its distance d is kept. Elevation is removed by this, so +z is the input
    camera's up, not gravity.

Color
    Images are sRGB in [0, 1], straight (not premultiplied) alpha on disk. Angles end in _deg or _rad.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

Normalization = Literal["sphere", "cube"]

#: How the three planes of a triplane lie in the world. Weights that others trained fix it: the deconvolution is
#: shared by the planes, so no rearrangement of weights could turn one of them.
PlaneLayout = Literal["lrm", "openlrm", "triposr"]

#: Axis pairs (column axis, row axis) that the three planes are sampled with, in channel order. OpenLRM's third is
#: (z, y). TripoSR sees the input view from +x where our world has it on -y: its x is our -y, its y our x.
PLANE_AXES: dict[PlaneLayout, tuple[tuple[int, int], ...]] = {
    "lrm": ((0, 1), (0, 2), (1, 2)),
    "openlrm": ((0, 1), (0, 2), (2, 1)),
    "triposr": ((1, 0), (1, 2), (0, 2)),
}

#: Planes whose columns run against the axis.
MIRRORED_PLANES: dict[PlaneLayout, tuple[int, ...]] = {"lrm": (), "openlrm": (), "triposr": (0, 1)}

#: Blender and OpenGL cameras look along -z with +y up; OpenCV's along +z with +y down.
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0]).astype(np.float32)

#: How far a rotation matrix may be from orthonormal before a pose is called "not rigid".
RIGID_TOLERANCE = 1e-4


def opengl_to_opencv(c2w: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Turn Blender / OpenGL poses into OpenCV poses (its own inverse).

    Args:
        c2w: (..., 4, 4) poses whose camera looks along -z with +y up.

    Returns:
        (..., 4, 4) the same cameras with +z forward and +y down.
    """
    return c2w @ OPENGL_TO_OPENCV


def rigid_error(c2w: npt.NDArray[np.float32]) -> float:
    """Measure how far poses are from rigid: 0 for a proper rotation, a translation and a last row of 0 0 0 1.

    Args:
        c2w: (..., 4, 4) poses.

    Returns:
        The largest absolute deviation of R^T R from the identity, of det R from 1, and of the last row;
        infinity where a number is not finite.
    """
    pose = np.asarray(c2w, dtype=np.float64)
    if not np.isfinite(pose).all():
        return float("inf")
    rotation = pose[..., :3, :3]
    orthonormal = np.abs(rotation.swapaxes(-1, -2) @ rotation - np.eye(3)).max()
    proper = np.abs(np.linalg.det(rotation) - 1).max()
    last_row = np.abs(pose[..., 3, :] - np.array([0.0, 0.0, 0.0, 1.0])).max()
    return float(max(orthonormal, proper, last_row))
