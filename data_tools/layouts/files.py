"""Search for object folders, and safe readers for untrusted files.

File sizes and array headers are checked before data is read and memory is allocated. Pickled arrays are rejected.
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
from lrm_pl.color_spaces import ColorSpaceError, is_srgb
from lrm_pl.data.manifest import MAX_MEMBER_BYTES
from lrm_pl.data.schema import HEADER_ERRORS, MAX_IMAGE_SIDE, encode_image
from lrm_pl.errors import InputError
from lrm_pl.images import DECODE_ERRORS, open_image, webp_size

#: Maximum size of a file with poses or intrinsics in bytes.
_MAX_ARRAY_BYTES = 1 << 20

#: Maximum number of views of a sample. The number of a view has three digits.
MAX_VIEWS = 999


class LayoutError(InputError):
    """Raised if a folder or file does not match the layout."""


@dataclasses.dataclass(frozen=True)
class PosedViews:
    """Views and cameras of an object, in the conventions of ``lrm_pl.conventions``.

    Attributes:
        c2w: (V, 4, 4) float32 camera-to-world matrices in the OpenCV convention, with +z up.
        fxfycxcy: (V, 4) float32 intrinsics divided by the image width and height.
        views: V encoded RGBA images in sRGB.
    """

    c2w: npt.NDArray[np.float32]
    fxfycxcy: npt.NDArray[np.float32]
    views: tuple[bytes, ...]


def find_folders(root: Path, names: str) -> list[Path]:
    """Find all folders that contain a file or folder whose name matches a pattern.

    Subfolders of a matching folder are not searched. Symbolic links to folders are followed, and each folder is
    returned only once. Dangling links are also returned, so that an error is reported when they are read.

    Args:
        root: Folder to search.
        names: Regular expression for the names.

    Returns:
        The folders, sorted by path.

    Raises:
        LayoutError: A folder cannot be listed.
    """

    def reject(error: OSError) -> None:
        raise LayoutError(expected="readable folders", found=error) from error

    found, seen = [], set()
    for path, folders, files in os.walk(root, followlinks=True, onerror=reject):
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
    """Return the images in a folder whose names are numbers, for example ``007.png``, in order.

    Raises:
        LayoutError: Two images have the same number.
    """
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"\d{1,6}\.(png|webp)", path.name)]
    images = sorted(found, key=lambda path: (int(path.stem), path.name))
    for first, second in itertools.pairwise(images):
        if int(first.stem) == int(second.stem):
            raise LayoutError(
                subject=folder,
                expected="one image per number",
                found=f"{first.name} and {second.name}",
                remedy="remove one of them",
            )
    return images


def read_file(path: Path, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """Read a file.

    Args:
        path: Path of the file.
        limit: Maximum size of the file in bytes.

    Raises:
        LayoutError: The file is missing or larger than ``limit``.
    """
    if not path.is_file():
        raise LayoutError(expected=f"a file at {path}", found="none")
    if path.stat().st_size > limit:
        raise LayoutError(subject=path, expected=f"at most {limit} bytes", found=path.stat().st_size)
    return path.read_bytes()


def read_views(files: Sequence[Path], folder: Path, aspect: float = 1.0) -> tuple[bytes, ...]:
    """Read the images of an object and convert them with ``to_rgba_view``.

    Args:
        files: Paths of the images.
        folder: Folder of the object, for error messages.
        aspect: Expected width of the images divided by the height.

    Returns:
        The encoded images.

    Raises:
        InputError: There are no images or more than ``MAX_VIEWS``, or an image is too large, has an unexpected aspect
            ratio, or has an unsupported color space.
    """
    if not 1 <= len(files) <= MAX_VIEWS:
        raise LayoutError(
            subject=folder, expected=f"1 to {MAX_VIEWS} images 000.png, 001.png, ...", found=len(files)
        )
    views = tuple(to_rgba_view(read_file(file), str(file)) for file in files)
    for file, view in zip(files, views, strict=True):
        try:
            with Image.open(io.BytesIO(view), formats=("PNG", "WEBP")) as image:  # reads only the header
                width, height = image.size
        except DECODE_ERRORS:
            continue  # reported when the view is decoded
        if abs(width - aspect * height) > 1:
            raise LayoutError(
                subject=file,
                expected=f"{aspect * height:.0f} x {height} pixels, the aspect ratio of the camera",
                found=f"{width} x {height}",
                remedy="remove cropped or stretched images",
            )
    return views


def to_rgba_view(content: bytes, name: str) -> bytes:
    """Convert an image with transparency to RGBA in sRGB.

    The image can also have a palette, a gray and an alpha channel, or one transparent color (tRNS), because PNG
    optimizers convert RGBA images to these formats.

    Args:
        content: Encoded image.
        name: Path for error messages.

    Returns:
        The encoded image. If ``content`` is an RGBA image in sRGB, has no transparency, or is not a valid image, it is
        returned unchanged. Invalid images are reported when they are decoded.

    Raises:
        ImageError: The colors cannot be converted to sRGB.
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
                if is_srgb(image, content):
                    return content
                stored = np.asarray(image)
    except ColorSpaceError:
        pass  # open_image raises the error with the name of the file
    except DECODE_ERRORS:
        return content
    # The EXIF orientation is ignored, because the camera refers to the stored pixels.
    rgba = np.asarray(open_image(content, name, upright=False))
    return content if stored is not None and np.array_equal(rgba, stored) else encode_image(rgba)


def read_pose(path: Path) -> npt.NDArray[np.float64]:
    """Read a pose from a ``.npy`` file that contains a (3, 4) or (4, 4) matrix.

    Returns:
        (4, 4) matrix.

    Raises:
        LayoutError: The file does not contain a matrix with one of these shapes.
    """
    pose = to_4x4(read_npy(path), str(path))
    if pose.shape != (4, 4):
        raise LayoutError(subject=path, expected="one 3 x 4 or 4 x 4 matrix", found=pose.shape)
    return pose


def read_npy(path: Path) -> npt.NDArray[np.float64]:
    """Read a numeric array from a ``.npy`` file.

    Raises:
        LayoutError: The file does not contain a numeric array, or the size does not match the header.
    """
    return parse_npy(read_file(path, _MAX_ARRAY_BYTES), str(path))


def read_npz(path: Path, name: str) -> npt.NDArray[np.float64]:
    """Read a numeric array from a ``.npz`` file.

    Args:
        path: Path of the file.
        name: Name of the array.

    Raises:
        LayoutError: The array is missing, not numeric or too large.
    """
    where = f"{path}, {name}"
    content = read_file(path, _MAX_ARRAY_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            with archive.open(f"{name}.npy") as member:
                content = member.read(_MAX_ARRAY_BYTES + 1)  # the size in the header is not trusted
    except (*ZIP_ERRORS, KeyError, OSError) as error:  # bz2 raises OSError for invalid data
        raise LayoutError(subject=where, expected="an array", found=error) from error
    if len(content) > _MAX_ARRAY_BYTES:
        raise LayoutError(subject=where, expected=f"at most {_MAX_ARRAY_BYTES} bytes", found="more")
    return parse_npy(content, where)


def parse_npy(content: bytes, where: str) -> npt.NDArray[np.float64]:
    """Parse the content of a ``.npy`` file.

    Args:
        content: Content of the file.
        where: Path for error messages.

    Raises:
        LayoutError: The content is not a numeric array, or the size does not match the header.
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
        raise LayoutError(subject=where, expected="a NumPy array", found=error) from error
    if dtype.kind not in "fiu":
        raise LayoutError(
            subject=where,
            expected="a numeric array",
            found=f"dtype {dtype}",
            remedy="save it without pickling",
        )
    numbers = file.read()
    # The size is checked before memory is allocated, because the header is untrusted.
    if any(n < 1 for n in shape) or len(numbers) != math.prod(shape) * dtype.itemsize:
        raise LayoutError(
            subject=where, expected=f"the data of shape {shape} and {dtype}", found=f"{len(numbers)} bytes"
        )
    return np.frombuffer(numbers, dtype).reshape(shape, order="F" if fortran else "C").astype(np.float64)


def to_4x4(matrices: npt.NDArray[np.float64], where: str) -> npt.NDArray[np.float64]:
    """Append the row (0, 0, 0, 1) to matrices.

    Args:
        matrices: Matrices with shape (..., 3, 4) or (..., 4, 4). If the shape is (..., 4, 4), they are not changed.
        where: Path for error messages.

    Returns:
        Matrices with shape (..., 4, 4).

    Raises:
        LayoutError: The matrices have an unexpected shape.
    """
    if matrices.shape[-2:] == (4, 4):
        return matrices
    if matrices.shape[-2:] != (3, 4):
        raise LayoutError(subject=where, expected="3 x 4 or 4 x 4 matrices", found=matrices.shape)
    last = np.broadcast_to([0.0, 0.0, 0.0, 1.0], (*matrices.shape[:-2], 1, 4))
    return np.concatenate([matrices, last], axis=-2)


def invert_poses(poses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Invert rigid transforms with shape (..., 4, 4)."""
    inverse = poses.copy()
    rotation = poses[..., :3, :3].swapaxes(-1, -2)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ poses[..., :3, 3:])[..., 0]
    return inverse
