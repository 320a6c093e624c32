"""Layout of Objaverse renders by Zero-1-to-3 (github.com/cvlab-columbia/zero123, objaverse-rendering/).

    <uid>/000.png    RGBA image
    <uid>/000.npy    (3, 4) world-to-camera matrix with OpenGL axes (x right, y up, z backward)

The matrices have OpenGL axes, because the conversion to OpenCV axes is disabled in the script that rendered the images.
Intrinsics are not stored. The focal length is 35 mm and the sensor width is 32 mm, which is a field of view of 49.1
degrees. The up axis of the world is +z. The longest side of an object is 1, and the distance of the cameras is between
1.5 and 2.2. This module multiplies all lengths by 2.
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

#: Focal length divided by the image width.
FOCAL = 35 / 32

#: Factor by which all lengths are multiplied, so that the longest side of an object is 2.
SCALE = 2.0


def find_objects(root: Path) -> list[Path]:
    """Return the object folders in ``root`` and its subfolders."""
    return find_folders(root, r"\d{1,6}\.(png|webp|npy)")


def list_images(folder: Path) -> list[Path]:
    """Return the images of an object in order."""
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
