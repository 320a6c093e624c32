"""What all layouts share: finding objects, and reading files that nobody vouches for.

A file is read when its size makes sense, an array when its header does; nothing is unpickled.
"""

import dataclasses
import io
import itertools
import math
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_tools.assets.archives import ZIP_ERRORS
from lrm_pl.color_spaces import ColorSpaceError, says_srgb
from lrm_pl.data.manifest import MAX_MEMBER_BYTES
from lrm_pl.data.schema import HEADER_ERRORS, MAX_IMAGE_SIDE, encode_image
from lrm_pl.errors import InputError
from lrm_pl.images import DECODE_ERRORS, open_image, webp_size

#: A pose has twelve numbers, the poses of 999 views 16 times as many; no such file is larger.
_MAX_ARRAY_BYTES = 1 << 20

#: A sample's views are numbered by three digits.
MAX_VIEWS = 999


class LayoutError(InputError):
    """An object's folder is not as its layout says; the message says what is wrong."""


@dataclasses.dataclass(frozen=True)
class PosedViews:
    """The views of one object, in our conventions.

    Attributes:
        c2w: (V, 4, 4) float32 poses, OpenCV, +z up.
        fxfycxcy: (V, 4) float32 intrinsics, divided by the picture's width and height.
        views: V encoded RGBA pictures, their colors sRGB.
    """

    c2w: npt.NDArray[np.float32]
    fxfycxcy: npt.NDArray[np.float32]
    views: tuple[bytes, ...]


def find_folders(root: Path, names: str) -> list[Path]:
    """Find the folders that hold a file or folder of such a name, sorted; nothing is searched inside them.

    Links to folders are followed; a folder that several paths lead to is found once. A link that leads nowhere counts
    as found: whoever reads it says why it cannot be used.

    Args:
        root: Where to search.
        names: Regular expression of the names.

    Raises:
        LayoutError: A folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise LayoutError(expected="a folder that can be listed", found=error) from error

    found, seen = [], set()
    for path, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(path)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if any(re.fullmatch(names, name) for name in (*folders, *files)):
            found.append(Path(path))
            folders.clear()
            continue
        folders.sort(key=lambda name: (Path(path, name).is_symlink(), name))
        found += [Path(path, file) for file in files if not Path(path, file).exists()]
    return sorted(found)


def numbered_images(folder: Path) -> list[Path]:
    """List the pictures of a folder whose names are numbers (``007.png``), in order.

    Raises:
        LayoutError: Two have one number.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"\d{1,6}\.(png|webp)", path.name)]
    pictures = sorted(found, key=lambda path: (int(path.stem), path.name))
    for first, second in itertools.pairwise(pictures):
        if int(first.stem) == int(second.stem):
            raise LayoutError(
                subject=folder,
                expected="one picture a number",
                found=f"{first.name} and {second.name}",
                remedy="remove one of them",
            )
    return pictures


def read_file(path: Path, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """Read a file of at most ``limit`` bytes.

    Raises:
        LayoutError: There is none, or a larger one.
    """
    if not path.is_file():
        raise LayoutError(expected=f"a file {path}", found="none")
    if path.stat().st_size > limit:
        raise LayoutError(subject=path, expected=f"at most {limit} bytes", found=path.stat().st_size)
    return path.read_bytes()


def read_views(files: Sequence[Path], folder: Path, aspect: float = 1.0) -> tuple[bytes, ...]:
    """Read an object's pictures, as ``to_rgba_view`` makes them.

    Args:
        files: The pictures.
        folder: Where they are.
        aspect: Width over height of what the camera sees.

    Raises:
        InputError: There are none, too many, or one is too large, of another shape, or of colors that cannot be
            converted.
    """
    if not 1 <= len(files) <= MAX_VIEWS:
        raise LayoutError(
            subject=folder, expected=f"1 to {MAX_VIEWS} pictures 000.png, 001.png, ...", found=len(files)
        )
    views = tuple(to_rgba_view(read_file(file), str(file)) for file in files)
    for file, view in zip(files, views, strict=True):
        try:
            with Image.open(io.BytesIO(view), formats=("PNG", "WEBP")) as image:  # only its header is read
                width, height = image.size
        except DECODE_ERRORS:
            continue  # whoever decodes it says so
        if abs(width - aspect * height) > 1:
            raise LayoutError(
                subject=file,
                expected=f"a picture of {aspect * height:.0f} x {height} pixels, the shape that its camera sees",
                found=f"{width} x {height}",
                remedy="it has been cut or stretched",
            )
    return views


def to_rgba_view(content: bytes, name: str) -> bytes:
    """Make a view with transparency the RGBA view of sRGB colors that it stands for.

    Tools that make PNGs smaller store RGBA as a palette, as gray with alpha, or with one transparent color (tRNS).

    Args:
        content: The file.
        name: What messages call it.

    Returns:
        The same bytes where it is such a view already, has no transparency, or is no picture: whoever decodes it says
        so.

    Raises:
        ImageError: Its colors cannot be converted to sRGB.
    """
    if max(webp_size(content)) > MAX_IMAGE_SIDE:
        return content
    stored = None
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as image:
            transparent = image.mode in ("RGBA", "LA") or "transparency" in image.info
            if not transparent or max(image.size) > MAX_IMAGE_SIDE:
                return content
            if image.mode == "RGBA":
                if says_srgb(image, content):
                    return content
                stored = np.asarray(image)
    except ColorSpaceError:
        pass  # refused below, with its name
    except DECODE_ERRORS:
        return content
    # Its camera was computed for the pixels as they are stored, whatever EXIF says.
    rgba = np.asarray(open_image(content, name, upright=False))
    return content if stored is not None and np.array_equal(rgba, stored) else encode_image(rgba)


def read_pose(path: Path) -> npt.NDArray[np.float64]:
    """Read a (4, 4) pose from a ``.npy`` file of 3 x 4 or 4 x 4 numbers.

    Raises:
        LayoutError: It holds anything else.
    """
    pose = to_4x4(read_npy(path), str(path))
    if pose.shape != (4, 4):
        raise LayoutError(subject=path, expected="one matrix", found=pose.shape)
    return pose


def read_npy(path: Path) -> npt.NDArray[np.float64]:
    """Read an array of numbers from a ``.npy`` file.

    Raises:
        LayoutError: It holds anything else, or another number of bytes than it says.
    """
    return parse_npy(read_file(path, _MAX_ARRAY_BYTES), str(path))


def read_npz(path: Path, name: str) -> npt.NDArray[np.float64]:
    """Read one array of numbers from a ``.npz`` file.

    Raises:
        LayoutError: It is not there, or holds anything else.
    """
    where = f"{path}, {name}"
    content = read_file(path, _MAX_ARRAY_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            with archive.open(f"{name}.npy") as member:
                content = member.read(_MAX_ARRAY_BYTES + 1)  # whatever its header says
    except (*ZIP_ERRORS, KeyError, OSError) as error:  # OSError: bz2's; nothing else is read here
        raise LayoutError(subject=where, expected="an array", found=error) from error
    if len(content) > _MAX_ARRAY_BYTES:
        raise LayoutError(subject=where, expected=f"at most {_MAX_ARRAY_BYTES} bytes", found="more")
    return parse_npy(content, where)


def parse_npy(content: bytes, where: str) -> npt.NDArray[np.float64]:
    """Turn the content of a ``.npy`` file into an array.

    Args:
        content: The file.
        where: What messages call it.

    Raises:
        LayoutError: It holds anything but numbers, or another number of bytes than it says.
    """
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran, dtype = read_header[version](file)
    except (*HEADER_ERRORS, KeyError) as error:
        raise LayoutError(subject=where, expected="a numpy array", found=error) from error
    if dtype.kind not in "fiu":
        raise LayoutError(
            subject=where, expected="an array of numbers", found=dtype, remedy="pickles are not read"
        )
    numbers = file.read()
    # Before anything is allocated: a header of a hundred bytes can ask for terabytes.
    if any(n < 1 for n in shape) or len(numbers) != math.prod(shape) * dtype.itemsize:
        raise LayoutError(subject=where, expected=f"{shape} of {dtype}", found=f"{len(numbers)} bytes")
    return np.frombuffer(numbers, dtype).reshape(shape, order="F" if fortran else "C").astype(np.float64)


def to_4x4(matrices: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.float64]:
    """Complete (..., 3, 4) matrices to (..., 4, 4) by the row 0 0 0 1; those that are 4 x 4 stay.

    Raises:
        LayoutError: Another shape.
    """
    if matrices.shape[-2:] == (4, 4):
        return matrices
    if matrices.shape[-2:] != (3, 4):
        raise LayoutError(subject=where, expected="matrices of 3 x 4 or 4 x 4", found=matrices.shape)
    last = np.broadcast_to([0.0, 0.0, 0.0, 1.0], (*matrices.shape[:-2], 1, 4))
    return np.concatenate([matrices, last], axis=-2)


def invert_poses(poses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Turn rigid (..., 4, 4) world-to-camera matrices into camera-to-world ones, or back."""
    inverse = poses.copy()
    rotation = poses[..., :3, :3].swapaxes(-1, -2)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ poses[..., :3, 3:])[..., 0]
    return inverse
