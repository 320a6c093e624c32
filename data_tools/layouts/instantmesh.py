"""Layout of InstantMesh's Objaverse renders (github.com/TencentARC/InstantMesh, src/data/objaverse.py and issue 13).

    <uid>/000.png        RGBA; 000_normal.png and 000_depth.png are not read
    <uid>/cameras.npz    cam_poses: V x 3 x 4

The field of view is 50 degrees, cameras are at distances of 2.0 to 3.5, +z is up, and the object is inside [-1, 1]^3.
The authors' loader reads ``cam_poses`` as world-to-camera with OpenGL axes (x right, y up, z backward). Their rendering
script is not published, and scripts by others store camera-to-world matrices or OpenCV axes. All these cameras look at
the origin, which ``to_opencv_poses`` uses to detect the convention. Another field of view is not detected.
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

#: Maximum offset of the origin from a camera's optical axis, relative to its distance.
_OFF_AXIS = 0.02


def find_objects(root: Path) -> list[Path]:
    """List the object folders below ``root``."""
    return find_folders(root, r"\d{1,6}\.(png|webp)|cameras\.npz")


def list_images(folder: Path) -> list[Path]:
    """List the images of an object, in order."""
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
    """Convert poses of unknown convention to OpenCV camera-to-world.

    Under the correct interpretation (camera-to-world or world-to-camera) the origin is on every optical axis, at
    negative z for OpenGL axes and at positive z for OpenCV axes.

    Args:
        matrices: (V, 4, 4) poses of cameras that look at the origin.
        where: Path for messages.

    Returns:
        (V, 4, 4) poses.

    Raises:
        LayoutError: The cameras do not look at the origin under either interpretation.
    """
    for c2w, w2c in ((invert_poses(matrices), matrices), (matrices, invert_poses(matrices))):
        origin = w2c[:, :3, 3]
        on_axis = np.linalg.norm(origin[:, :2], axis=1) <= _OFF_AXIS * np.abs(origin[:, 2])
        if on_axis.all() and (origin[:, 2] < 0).all():
            return opengl_to_opencv(c2w.astype(np.float32))
        if on_axis.all() and (origin[:, 2] > 0).all():
            return c2w.astype(np.float32)
    raise LayoutError(subject=where, expected="cameras that look at the origin", found="others")
