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
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.layouts.files import LayoutError, read_file

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
        """Compute the displacement of image points by lens distortion.

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
        LayoutError: A file is missing, truncated or invalid.
    """
    cameras = read_cameras(folder / "cameras.bin")
    return sorted(read_images(folder / "images.bin", cameras), key=lambda image: image.name)


def read_cameras(path: Path) -> dict[int, Camera]:
    """Return a mapping from ids to the cameras in ``cameras.bin``.

    Raises:
        LayoutError: The file is missing, truncated or invalid, or a camera model is not supported.
    """
    reader, cameras = _Reader(path), dict[int, Camera]()
    for _ in range(reader.read_count()):
        key, model, width, height = reader.read(_CAMERA)
        if model not in _MODELS:
            raise LayoutError(
                subject=path,
                expected="a pinhole, radial or OpenCV camera model",
                found=f"model id {model}",
            )
        values = dict(zip(_MODELS[model], reader.read(f"<{len(_MODELS[model])}d"), strict=True))
        if "f" in values:
            values["fx"] = values["fy"] = values.pop("f")
        if (
            not np.isfinite(list(values.values())).all()
            or min(values["fx"], values["fy"]) <= 0
            or not width * height
        ):
            raise LayoutError(
                subject=path, expected="valid intrinsics", found=f"{width} x {height} pixels, {values}"
            )
        cameras[key] = Camera(width, height, **values)
    reader.require_end()
    return cameras


def read_images(path: Path, cameras: dict[int, Camera]) -> list[PosedImage]:
    """Read ``images.bin``.

    Args:
        path: Path of the file.
        cameras: Mapping from ids to cameras.

    Raises:
        LayoutError: The file is missing, truncated or invalid.
    """
    reader, images = _Reader(path), []
    for _ in range(reader.read_count()):
        _, *pose, camera = reader.read(_IMAGE)
        name = reader.read_name()
        reader.skip(_POINT_BYTES * reader.read_count())
        length = np.linalg.norm(pose[:4])
        if camera not in cameras or not np.isfinite(pose).all() or not 0.5 < length < 2:
            raise LayoutError(
                subject=path, expected="a valid pose and camera id", found=f"{pose} and {camera}"
            )
        c2w = np.eye(4)
        c2w[:3, :3] = _rotation(np.array(pose[:4]) / length).T
        c2w[:3, 3] = -c2w[:3, :3] @ pose[4:]
        images.append(PosedImage(name, c2w, cameras[camera]))
    reader.require_end()
    return images


def _rotation(quaternion: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert a unit quaternion (w, x, y, z) to the rotation matrix I + 2 w [v] + 2 [v]^2, where v = (x, y, z)."""
    w, x, y, z = quaternion
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


class _Reader:
    """Sequential reader of a binary file with bounds checks."""

    def __init__(self, path: Path) -> None:
        self._path, self._content, self._at = path, read_file(path, _MAX_MODEL_BYTES), 0

    def read(self, layout: str) -> tuple[Any, ...]:
        start = self._at
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self._content, start)

    def read_count(self) -> int:
        return int(self.read("<Q")[0])

    def read_name(self) -> str:
        end = self._content.find(b"\0", self._at)
        if end < 0:
            raise LayoutError(
                subject=self._path, expected="a null-terminated name", found="the end of the file"
            )
        text = self._content[self._at : end]
        self._at = end + 1
        return text.decode(errors="replace")

    def skip(self, size: int) -> None:
        if self._at + size > len(self._content):
            raise LayoutError(
                subject=self._path, expected=f"at least {self._at + size} bytes", found=len(self._content)
            )
        self._at += size

    def require_end(self) -> None:
        if self._at != len(self._content):
            raise LayoutError(subject=self._path, expected=f"{self._at} bytes", found=len(self._content))
