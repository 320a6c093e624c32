"""Zero-1-to-3's renders of Objaverse (github.com/cvlab-columbia/zero123, objaverse-rendering/).

    <uid>/000.png    RGBA
    <uid>/000.npy    3 x 4, world to camera; Blender's camera: x right, y up, z backward

The script descends from one that turned its camera's axes into those of OpenCV, but that line is commented out. There
are no intrinsics: lens 35 mm, sensor 32 mm, so 49.1 degrees. The world is +z up; the object's longest side is 1 there,
and the cameras stand at 1.5 to 2.2 from the origin: all lengths are doubled here.
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

#: Focal length in picture sides: lens / sensor.
FOCAL = 35 / 32

#: Our longest side over theirs.
SCALE = 2.0


def find_objects(root: Path) -> list[Path]:
    """List the folders of objects below ``root``."""
    return find_folders(root, r"\d{1,6}\.(png|webp|npy)")


def list_images(folder: Path) -> list[Path]:
    """List an object's list_images, in order."""
    return numbered_images(folder)


def read_object(folder: Path) -> PosedViews:
    """Read an object.

    Raises:
        LayoutError: A file is missing or strange.
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
