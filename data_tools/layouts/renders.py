"""Layouts of the Objaverse renderings of OpenLRM, Zero-1-to-3 and InstantMesh. The world up axis is +z.

OpenLRM (github.com/3DTopia/OpenLRM, scripts/data/objaverse/blender_script.py):

    <uid>/rgba/000.png        RGBA image
    <uid>/pose/000.npy        (3, 4) camera-to-world matrix with OpenGL axes (x right, y up, z backward)
    <uid>/intrinsics.npy      (3, 2) rows (fx, fy), (cx, cy) and (width, height) in pixels

The size of the images can differ from the size in ``intrinsics.npy``. The bounding box of the object is centered at
the origin, and the longest side is 2. The focal length is 0.75 times the image width (24 mm lens, 32 mm sensor).

Zero-1-to-3 (github.com/cvlab-columbia/zero123, objaverse-rendering/):

    <uid>/000.png             RGBA image
    <uid>/000.npy             (3, 4) world-to-camera matrix with OpenGL axes

The matrices have OpenGL axes, because the conversion to OpenCV axes is disabled in the script that rendered the images.
Intrinsics are not stored. The focal length is 35 mm and the sensor width is 32 mm, which corresponds to a field of
view of 49.1 degrees. The longest side of an object is 1, and the camera distance is between 1.5 and 2.2. This module
multiplies all lengths by 2.

InstantMesh (github.com/TencentARC/InstantMesh, src/data/objaverse.py and issue 13):

    <uid>/000.png             RGBA image
    <uid>/cameras.npz         array ``cam_poses`` with shape (V, 3, 4)

The field of view is 50 degrees, the camera distance is between 2.0 and 3.5, and the object is inside [-1, 1]^3.
The files ``000_normal.png`` and ``000_depth.png`` are ignored. The data loader of InstantMesh reads ``cam_poses`` as
world-to-camera matrices with OpenGL axes. The script that rendered the images is not published, and scripts by third
parties store camera-to-world matrices or use OpenCV axes. ``to_opencv_poses`` detects the convention, because the
cameras look at the origin. A field of view that is not 50 degrees is not detected.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.layouts.files import (
    LayoutError,
    PosedViews,
    invert_poses,
    numbered_images,
    read_file,
    read_npy,
    read_npz,
    to_4x4,
    to_rgba_view,
)
from data_tools.rendering.cameras import focal_from_fov
from lrm_pl.conventions import OPENGL_TO_OPENCV

#: Focal length of Zero-1-to-3 divided by the image width.
ZERO123_FOCAL = 35 / 32

#: Factor by which the lengths of Zero-1-to-3 are multiplied, so that the longest side of an object is 2.
ZERO123_SCALE = 2.0

INSTANTMESH_FOV_DEG = 50.0

#: Maximum distance between the origin and the optical axis of a camera, as a fraction of the distance along the axis.
_OFF_AXIS = 0.02

_Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class RenderLayout:
    """Layout of rendered views.

    Attributes:
        names: Regular expression for files and folders that an object folder contains.
        images: Folder of the images relative to the object folder.
        read_cameras: Function that reads the cameras for the images in an object folder. The return values are
            (V, 4, 4) camera-to-world matrices in the OpenCV convention, (4,) normalized intrinsics, and the image width
            divided by the height.
    """

    names: str
    images: str
    read_cameras: Callable[[Path, Sequence[Path]], tuple[_Array, _Array, float]]

    def read(self, folder: Path) -> PosedViews:
        """Read the views of an object.

        Raises:
            InputError: A file is missing or invalid.
        """
        files = numbered_images(folder / self.images)
        c2w, intrinsics, aspect = self.read_cameras(folder, files)
        return PosedViews(
            c2w=c2w.astype(np.float32),
            fxfycxcy=np.tile(intrinsics, (len(files), 1)).astype(np.float32),
            views=tuple(to_rgba_view(read_file(file), str(file), aspect) for file in files),
        )


def _read_openlrm(folder: Path, files: Sequence[Path]) -> tuple[_Array, _Array, float]:
    path = folder / "intrinsics.npy"
    intrinsics = read_npy(path)
    if intrinsics.shape != (3, 2) or not (intrinsics[2] > 0).all():
        raise LayoutError(
            subject=path, expected="rows (fx, fy), (cx, cy) and (width, height)", found=intrinsics.tolist()
        )
    c2w = _read_poses([folder / "pose" / f"{file.stem}.npy" for file in files]) @ OPENGL_TO_OPENCV
    return c2w, (intrinsics[:2] / intrinsics[2]).ravel(), float(intrinsics[2, 0] / intrinsics[2, 1])


def _read_zero123(_: Path, files: Sequence[Path]) -> tuple[_Array, _Array, float]:
    c2w = invert_poses(_read_poses([file.with_suffix(".npy") for file in files])) @ OPENGL_TO_OPENCV
    c2w[:, :3, 3] *= ZERO123_SCALE
    return c2w, np.array([ZERO123_FOCAL, ZERO123_FOCAL, 0.5, 0.5]), 1.0


def _read_instantmesh(folder: Path, files: Sequence[Path]) -> tuple[_Array, _Array, float]:
    path, count = folder / "cameras.npz", len(files)
    if int(files[-1].stem) != count - 1:
        raise LayoutError(
            subject=folder, expected=f"images with the numbers 0 to {count - 1}", found=files[-1].name
        )
    poses = to_4x4(read_npz(path, "cam_poses"), (count,), path)
    focal = focal_from_fov(np.array(INSTANTMESH_FOV_DEG))
    return to_opencv_poses(poses, path), np.array([focal, focal, 0.5, 0.5]), 1.0


def _read_poses(files: Sequence[Path]) -> _Array:
    return np.stack([to_4x4(read_npy(file), (), file) for file in files])


def to_opencv_poses(matrices: _Array, where: Path) -> _Array:
    """Convert poses in an unknown convention to OpenCV camera-to-world matrices.

    If the matrices are interpreted correctly as camera-to-world or world-to-camera, the origin is on the optical axes
    of all cameras. In camera coordinates, the z coordinate of the origin is negative for OpenGL axes and positive for
    OpenCV axes.

    Args:
        matrices: (V, 4, 4) poses of cameras that look at the origin.
        where: Path for error messages.

    Returns:
        (V, 4, 4) camera-to-world matrices in the OpenCV convention.

    Raises:
        LayoutError: The cameras do not look at the origin in any of the supported conventions.
    """
    inverse = invert_poses(matrices)
    for c2w, w2c in ((inverse, matrices), (matrices, inverse)):
        x, y, z = w2c[:, :3, 3].T
        if (np.hypot(x, y) < _OFF_AXIS * np.abs(z)).all() and ((z > 0).all() or (z < 0).all()):
            return c2w if z[0] > 0 else c2w @ OPENGL_TO_OPENCV
    raise LayoutError(subject=where, expected="cameras that look at the origin", found="other directions")


RENDER_LAYOUTS = {
    "openlrm": RenderLayout(r"rgba|pose|intrinsics\.npy", "rgba", _read_openlrm),
    "zero123": RenderLayout(r"\d{1,6}\.(png|webp|npy)", "", _read_zero123),
    "instantmesh": RenderLayout(r"\d{1,6}\.(png|webp)|cameras\.npz", "", _read_instantmesh),
}
