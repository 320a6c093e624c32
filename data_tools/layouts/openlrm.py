"""OpenLRM's renders of Objaverse (github.com/3DTopia/OpenLRM, scripts/data/objaverse/blender_script.py).

    <uid>/rgba/000.png        RGBA
    <uid>/pose/000.npy        3 x 4, camera to world; Blender's camera: x right, y up, z backward
    <uid>/intrinsics.npy      3 x 2, pixels: fx fy, cx cy, width height; the list_images may have been resized since

The world is ours: +z up, the object's longest side is 2, the center of its box is the origin. The focal length is 0.75
of the width (lens 24 mm, sensor 32 mm).
"""

from pathlib import Path

import numpy as np

from data_tools.layouts.files import (
    LayoutError,
    PosedViews,
    find_folders,
    numbered_images,
    read_npy,
    read_pose,
    read_views,
)
from lrm_pl.conventions import opengl_to_opencv


def find_objects(root: Path) -> list[Path]:
    """List the folders of objects below ``root``."""
    return find_folders(root, r"rgba|pose|intrinsics\.npy")


def list_images(folder: Path) -> list[Path]:
    """List an object's list_images, in order."""
    return numbered_images(folder / "rgba")


def read_object(folder: Path) -> PosedViews:
    """Read an object.

    Raises:
        LayoutError: A file is missing or strange.
    """
    intrinsics = read_npy(folder / "intrinsics.npy")
    if intrinsics.shape != (3, 2) or not (intrinsics[2] > 0).all():
        raise LayoutError(
            subject=folder / "intrinsics.npy",
            expected="fx fy, cx cy, width height",
            found=intrinsics.tolist(),
        )
    camera = (intrinsics[:2] / intrinsics[2]).reshape(4)
    files = list_images(folder)
    views = read_views(files, folder, float(intrinsics[2, 0] / intrinsics[2, 1]))
    c2w = np.stack([read_pose(folder / "pose" / f"{file.stem}.npy") for file in files])
    return PosedViews(
        c2w=opengl_to_opencv(c2w.astype(np.float32)),
        fxfycxcy=np.tile(camera, (len(files), 1)).astype(np.float32),
        views=views,
    )
