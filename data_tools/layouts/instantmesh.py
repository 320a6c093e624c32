"""InstantMesh's renders of Objaverse (github.com/TencentARC/InstantMesh, src/data/objaverse.py and issue 13).

    <uid>/000.png        RGBA (beside 000_normal.png and 000_depth.png, which are not needed)
    <uid>/cameras.npz    cam_poses: V x 3 x 4

50 degrees, cameras at 2.0 to 3.5 from the origin, +z up, the object inside [-1, 1]^3, as here. The authors' loader
takes ``cam_poses`` for world to camera, and after inverting it for Blender's camera (x right, y up, z backward). Their
script was never published; those that users wrote also store camera to world, or OpenCV's axes. All these cameras look
at the origin, so ``to_opencv_poses`` finds the convention. A field of view that is not 50 degrees is
not found out.
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

#: How far from its optical axis a camera may have the origin, as a part of the distance.
_OFF_AXIS = 0.02


def find_objects(root: Path) -> list[Path]:
    """List the folders of objects below ``root``."""
    return find_folders(root, r"\d{1,6}\.(png|webp)|cameras\.npz")


def list_images(folder: Path) -> list[Path]:
    """List an object's list_images, in order."""
    return numbered_images(folder)


def read_object(folder: Path) -> PosedViews:
    """Read an object.

    Raises:
        LayoutError: A file is missing or strange, or the cameras do not look at the origin.
    """
    path = folder / "cameras.npz"
    files = list_images(folder)
    views = read_views(files, folder)
    poses = to_4x4(read_npz(path, "cam_poses"), str(path))
    if poses.shape != (len(files), 4, 4) or [int(file.stem) for file in files] != list(range(len(files))):
        raise LayoutError(
            subject=path, expected=f"a pose for each of {len(files)} list_images", found=poses.shape
        )
    focal = focal_from_fov(np.array(FOV_DEG))
    return PosedViews(
        c2w=to_opencv_poses(poses, str(path)),
        fxfycxcy=np.tile([focal, focal, 0.5, 0.5], (len(files), 1)).astype(np.float32),
        views=views,
    )


def to_opencv_poses(matrices: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.float32]:
    """Tell world to camera from camera to world, and Blender's axes from OpenCV's.

    Taken for what they are, the cameras have the origin on their optical axes; Blender's have it at negative z.

    Args:
        matrices: (V, 4, 4) poses of cameras that look at the origin.
        where: What messages call them.

    Returns:
        (V, 4, 4) the same cameras, OpenCV camera to world.

    Raises:
        LayoutError: Neither reading has cameras that look at the origin.
    """
    for c2w, w2c in ((invert_poses(matrices), matrices), (matrices, invert_poses(matrices))):
        origin = w2c[:, :3, 3]
        on_axis = np.linalg.norm(origin[:, :2], axis=1) <= _OFF_AXIS * np.abs(origin[:, 2])
        if on_axis.all() and (origin[:, 2] < 0).all():
            return opengl_to_opencv(c2w.astype(np.float32))
        if on_axis.all() and (origin[:, 2] > 0).all():
            return c2w.astype(np.float32)
    raise LayoutError(subject=where, expected="cameras that look at the origin", found="others")
