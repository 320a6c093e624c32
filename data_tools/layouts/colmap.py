"""Reader for COLMAP models in the binary format (colmap.github.io/format.html), which is little endian.

    cameras.bin   number of cameras (u64), and for each camera
                  id (u32), model (i32), width (u64), height (u64), parameters (f64)
    images.bin    number of images (u64), and for each image
                  id (u32), rotation w x y z (f64), translation (f64), camera (u32), null-terminated name,
                  number of points (u64), and for each point x y (f64), id (i64)

The rotation and translation are a world-to-camera transform with OpenCV axes. The numbers of records are untrusted, so
the records are read sequentially without preallocation. The center of the first pixel is (0.5, 0.5), as in
``lrm_pl.conventions``.
"""

import dataclasses
import os
import struct
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_tools.layouts.files import LayoutError, read_file

_Record = TypeVar("_Record")

#: Maximum size of a file in bytes.
_MAX_MODEL_BYTES = 1 << 28

#: Mapping from the ids of camera models to the names of the parameters.
_MODELS = {
    0: ("f", "cx", "cy"),  # SIMPLE_PINHOLE
    1: ("fx", "fy", "cx", "cy"),  # PINHOLE
    2: ("f", "cx", "cy", "k1"),  # SIMPLE_RADIAL
    3: ("f", "cx", "cy", "k1", "k2"),  # RADIAL
    4: ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),  # OPENCV
}

_CAMERA = "<IiQQ"
_IMAGE = "<I7dI"
_POINT_BYTES = 24


@dataclasses.dataclass(frozen=True)
class Camera:
    """Camera intrinsics in pixels, with the distortion coefficients of OpenCV."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    k1: float = 0.0
    k2: float = 0.0
    p1: float = 0.0
    p2: float = 0.0

    def displacement(self, pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Compute the displacement of image points that is caused by lens distortion.

        Args:
            pixels: (N, 2) image points in pixels.

        Returns:
            (N,) displacements in pixels.
        """
        x, y = (pixels[:, 0] - self.cx) / self.fx, (pixels[:, 1] - self.cy) / self.fy
        square = x * x + y * y
        radial = self.k1 * square + self.k2 * square**2
        dx = x * radial + 2 * self.p1 * x * y + self.p2 * (square + 2 * x * x)
        dy = y * radial + 2 * self.p2 * x * y + self.p1 * (square + 2 * y * y)
        return np.hypot(self.fx * dx, self.fy * dy)


@dataclasses.dataclass(frozen=True)
class PosedImage:
    """An image whose pose COLMAP estimated.

    Attributes:
        name: File name.
        c2w: (4, 4) float64 camera-to-world matrix with OpenCV axes, in the world coordinates of COLMAP.
        camera: Intrinsics.
    """

    name: str
    c2w: npt.NDArray[np.float64]
    camera: Camera


def read_model(folder: Path) -> list[PosedImage]:
    """Read the images of a model.

    Args:
        folder: Folder that contains ``cameras.bin`` and ``images.bin``.

    Returns:
        The images, sorted by name.

    Raises:
        LayoutError: A file is missing, truncated or invalid, or a camera model is not supported.
    """
    cameras = dict(_read_records(folder / "cameras.bin", _read_camera))
    read_image = partial(_read_image, cameras=cameras)
    return sorted(_read_records(folder / "images.bin", read_image), key=lambda image: image.name)


def _read_records(path: Path, read_record: Callable[[BytesIO], _Record]) -> list[_Record]:
    """Read a file that consists of the number of records, followed by the records."""
    content = read_file(path, _MAX_MODEL_BYTES)
    file = BytesIO(content)
    try:
        (count,) = _unpack(file, "<Q")
        records = [read_record(file) for _ in range(count)]
    except (
        struct.error,
        OverflowError,
    ) as error:  # an OverflowError is raised for a file position above 2^63
        raise LayoutError(subject=path, expected="complete records", found=f"{len(content)} bytes") from error
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from error
    if file.tell() != len(content):
        raise LayoutError(subject=path, expected=f"{file.tell()} bytes", found=len(content))
    return records


def _read_camera(file: BytesIO) -> tuple[int, Camera]:
    key, model, width, height = _unpack(file, _CAMERA)
    if model not in _MODELS:
        raise LayoutError(expected="a pinhole, radial or OpenCV camera model", found=f"model id {model}")
    values = dict(zip(_MODELS[model], _unpack(file, f"<{len(_MODELS[model])}d"), strict=True))
    if "f" in values:
        values["fx"] = values["fy"] = values.pop("f")
    positive = min(width, height, values["fx"], values["fy"]) > 0
    if not positive or not np.isfinite(list(values.values())).all():
        raise LayoutError(expected="valid intrinsics", found=f"{width} x {height} pixels, {values}")
    return key, Camera(width, height, **values)


def _read_image(file: BytesIO, cameras: dict[int, Camera]) -> PosedImage:
    _, *pose, camera = _unpack(file, _IMAGE)
    name = bytearray()
    while (character := _unpack(file, "c")[0]) != b"\0":
        name += character
    (points,) = _unpack(file, "<Q")
    file.seek(_POINT_BYTES * points, os.SEEK_CUR)
    length = np.linalg.norm(pose[:4])
    if camera not in cameras or not np.isfinite(pose).all() or not 0.5 < length < 2:
        raise LayoutError(expected="a valid pose and camera id", found=f"{pose} and {camera}")
    c2w = np.eye(4)
    c2w[:3, :3] = _rotation(np.array(pose[:4]) / length).T
    c2w[:3, 3] = -c2w[:3, :3] @ pose[4:]
    return PosedImage(name.decode(errors="replace"), c2w, cameras[camera])


def _unpack(file: BytesIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _rotation(quaternion: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert a unit quaternion (w, x, y, z) to a rotation matrix.

    The matrix is I + 2 w [v] + 2 [v]^2, where [v] is the cross product matrix of v = (x, y, z).
    """
    w, x, y, z = quaternion
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross
