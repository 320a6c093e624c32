"""Layout of Objaverse renders by InstantMesh (github.com/TencentARC/InstantMesh, src/data/objaverse.py and issue 13).

    <uid>/000.png        RGBA image
    <uid>/cameras.npz    array ``cam_poses`` with shape (V, 3, 4)

The field of view is 50 degrees, the distance of the cameras is between 2.0 and 3.5, the up axis is +z, and the object
is inside [-1, 1]^3. The files ``000_normal.png`` and ``000_depth.png`` are ignored.

The data loader of InstantMesh reads ``cam_poses`` as world-to-camera matrices with OpenGL axes (x right, y up, z
backward). The script that rendered the images is not published, and scripts by third parties store camera-to-world
matrices or OpenCV axes. ``to_opencv_poses`` detects the convention, because the cameras look at the origin. A field of
view that is not 50 degrees is not detected.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.layouts.files import (
    LayoutError,
    PosedViews,
    find_folders,
    invert_poses,
    numbered_images,
    read_npz,
    read_views,
    to_4x4,
)
from data_tools.rendering.cameras import focal_from_fov
from lrm_pl.conventions import opengl_to_opencv

FOV_DEG = 50.0

#: Maximum distance between the origin and the optical axis of a camera, as a fraction of the distance along the axis.
_OFF_AXIS = 0.02


def find_objects(root: Path) -> list[Path]:
    """Return the object folders in ``root`` and its subfolders."""
    return find_folders(root, r"\d{1,6}\.(png|webp)|cameras\.npz")


def list_images(folder: Path) -> list[Path]:
    """Return the images of an object in order."""
    return numbered_images(folder)


def read_object(folder: Path) -> PosedViews:
    """Read the views of an object.

    Raises:
        LayoutError: A file is missing or invalid, or a camera does not look at the origin.
    """
    path = folder / "cameras.npz"
    files = list_images(folder)
    views = read_views(files, folder)
    poses = to_4x4(read_npz(path, "cam_poses"), str(path))
    if poses.shape != (len(files), 4, 4) or [int(file.stem) for file in files] != list(range(len(files))):
        raise LayoutError(
            subject=path, expected=f"one pose for each of {len(files)} images", found=poses.shape
        )
    focal = focal_from_fov(np.array(FOV_DEG))
    return PosedViews(
        c2w=to_opencv_poses(poses, str(path)),
        fxfycxcy=np.tile([focal, focal, 0.5, 0.5], (len(files), 1)).astype(np.float32),
        views=views,
    )


def to_opencv_poses(matrices: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.float32]:
    """Convert poses in an unknown convention to OpenCV camera-to-world matrices.

    If the matrices are interpreted correctly as camera-to-world or world-to-camera, the origin is on the optical axes
    of all cameras. The z coordinate of the origin is negative for OpenGL axes and positive for OpenCV axes.

    Args:
        matrices: (V, 4, 4) poses of cameras that look at the origin.
        where: Path for error messages.

    Returns:
        (V, 4, 4) camera-to-world matrices in the OpenCV convention.

    Raises:
        LayoutError: The cameras do not look at the origin in any of the supported conventions.
    """
    for c2w, w2c in ((invert_poses(matrices), matrices), (matrices, invert_poses(matrices))):
        origin = w2c[:, :3, 3]
        on_axis = np.linalg.norm(origin[:, :2], axis=1) <= _OFF_AXIS * np.abs(origin[:, 2])
        if on_axis.all() and (origin[:, 2] < 0).all():
            return opengl_to_opencv(c2w.astype(np.float32))
        if on_axis.all() and (origin[:, 2] > 0).all():
            return c2w.astype(np.float32)
    raise LayoutError(subject=where, expected="cameras that look at the origin", found="others")
