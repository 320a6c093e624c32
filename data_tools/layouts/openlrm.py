"""Layout of Objaverse renders by OpenLRM (github.com/3DTopia/OpenLRM, scripts/data/objaverse/blender_script.py).

    <uid>/rgba/000.png        RGBA image
    <uid>/pose/000.npy        (3, 4) camera-to-world matrix with OpenGL axes (x right, y up, z backward)
    <uid>/intrinsics.npy      (3, 2) rows (fx, fy), (cx, cy) and (width, height) in pixels

The images can have a different size than ``intrinsics.npy`` specifies. The up axis of the world is +z. The bounding box
of the object is centered at the origin, and the longest side is 2. The focal length is 0.75 times the image width
(24 mm lens, 32 mm sensor).
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
    """Return the object folders in ``root`` and its subfolders."""
    return find_folders(root, r"rgba|pose|intrinsics\.npy")


def list_images(folder: Path) -> list[Path]:
    """Return the images of an object in order."""
    return numbered_images(folder / "rgba")


def read_object(folder: Path) -> PosedViews:
    """Read the views of an object.

    Raises:
        LayoutError: A file is missing or invalid.
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
