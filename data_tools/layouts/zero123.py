"""Layout of Zero-1-to-3's Objaverse renders (github.com/cvlab-columbia/zero123, objaverse-rendering/).

    <uid>/000.png    RGBA
    <uid>/000.npy    3 x 4 world-to-camera, OpenGL axes (x right, y up, z backward)

The rendering script's conversion to OpenCV axes is commented out. Intrinsics are not stored: the lens is 35 mm and the
sensor 32 mm, a field of view of 49.1 degrees. The world has +z up. The object's longest side is 1 and the cameras are
at distances of 1.5 to 2.2, so all lengths are doubled here.
"""

from pathlib import Path

import numpy as np

from data_tools.layouts.files import (
    PosedViews,
    find_folders,
    invert_poses,
    numbered_images,
    read_pose,
    read_views,
)
from lrm_pl.conventions import opengl_to_opencv

#: Focal length in image widths: lens / sensor.
FOCAL = 35 / 32

#: Longest side of an object here over that in the layout.
SCALE = 2.0


def find_objects(root: Path) -> list[Path]:
    """List the object folders below ``root``."""
    return find_folders(root, r"\d{1,6}\.(png|webp|npy)")


def list_images(folder: Path) -> list[Path]:
    """List the images of an object, in order."""
    return numbered_images(folder)


def read_object(folder: Path) -> PosedViews:
    """Read the views of an object.

    Raises:
        LayoutError: A file is missing or invalid.
    """
    files = list_images(folder)
    views = read_views(files, folder)
    c2w = invert_poses(np.stack([read_pose(file.with_suffix(".npy")) for file in files]))
    c2w[:, :3, 3] *= SCALE
    return PosedViews(
        c2w=opengl_to_opencv(c2w.astype(np.float32)),
        fxfycxcy=np.tile([FOCAL, FOCAL, 0.5, 0.5], (len(files), 1)).astype(np.float32),
        views=views,
    )
