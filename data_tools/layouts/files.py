"""Functions that find object folders and safely read untrusted files.

The size of a file is checked before it is read. Pickled arrays are rejected.
"""

import dataclasses
import io
import itertools
import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_tools.assets.archives import open_zip, read_member
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
        raise LayoutError(expected="a readable folder", found=error) from error

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
    """Return the images in a folder whose names are numbers, for example, ``007.png``, in order.

    Raises:
        LayoutError: There are no images or more than ``MAX_VIEWS``, or two images have the same number.
    """
    found = [path for path in folder.glob("*") if re.fullmatch(r"\d{1,6}\.(png|webp)", path.name)]
    images = sorted(found, key=lambda path: (int(path.stem), path.name))
    if not 1 <= len(images) <= MAX_VIEWS:
        expected = f"1 to {MAX_VIEWS} images with the names 000.png, 001.png, ..."
        raise LayoutError(subject=folder, expected=expected, found=len(images))
    for first, second in itertools.pairwise(images):
        if int(first.stem) == int(second.stem):
            names = f"{first.name} and {second.name}"
            raise LayoutError("one image per number", names, "remove one of the images", folder)
    return images


def read_file(path: Path, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """Read a file.

    Args:
        path: Path of the file.
        limit: Maximum size of the file in bytes.

    Raises:
        LayoutError: The file is missing or larger than ``limit``.
    """
    _require_file(path, limit)
    return path.read_bytes()


def _require_file(path: Path, limit: int) -> None:
    if not path.is_file():
        raise LayoutError(expected=f"a file at {path}", found="none")
    if path.stat().st_size > limit:
        raise LayoutError(subject=path, expected=f"at most {limit} bytes", found=path.stat().st_size)


def to_rgba_view(content: bytes, name: str, aspect: float | None = None) -> bytes:
    """Convert an image with transparency to RGBA in sRGB.

    Images with a palette, with a gray and an alpha channel, or with one transparent color (tRNS) are supported, because
    PNG optimizers convert RGBA images to these formats. The EXIF orientation is ignored, because the camera refers to
    the stored pixels.

    Args:
        content: Encoded image.
        name: Path for error messages.
        aspect: Expected width divided by the height. If None, the image can have any aspect ratio.

    Returns:
        The encoded image. If ``content`` is an RGBA image in sRGB, has no transparency, or is not a valid image, it is
        returned unchanged. Invalid images are reported when they are decoded.

    Raises:
        LayoutError: The image has an unexpected aspect ratio.
        ImageError: The colors cannot be converted to sRGB.
    """
    if max(webp_size(content)) > MAX_IMAGE_SIDE:
        return content
    stored = None
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as image:
            _check_aspect(image.size, name, aspect)
            transparent = image.mode in ("RGBA", "LA") or "transparency" in image.info
            if not transparent or max(image.size) > MAX_IMAGE_SIDE:
                return content
            if image.mode == "RGBA":
                if is_srgb(image, content):
                    return content
                stored = np.asarray(image)
    except LayoutError:
        raise
    except ColorSpaceError:
        pass  # open_image raises the error with the name of the file
    except DECODE_ERRORS:
        return content
    rgba = np.asarray(open_image(content, name, upright=False))
    return content if stored is not None and np.array_equal(rgba, stored) else encode_image(rgba)


def _check_aspect(size: tuple[int, int], name: str, aspect: float | None) -> None:
    width, height = size
    if aspect is not None and abs(width - aspect * height) > 1:
        expected = f"{aspect * height:.0f} x {height} pixels, the aspect ratio of the camera"
        raise LayoutError(expected, f"{width} x {height}", "remove cropped or stretched images", name)


def read_npy(path: Path) -> npt.NDArray[np.float64]:
    """Read a numeric array from a ``.npy`` file.

    Raises:
        LayoutError: The file is missing, too large or not a numeric array.
    """
    return parse_npy(read_file(path, _MAX_ARRAY_BYTES), str(path))


def read_npz(path: Path, name: str) -> npt.NDArray[np.float64]:
    """Read a numeric array from a ``.npz`` file.

    Args:
        path: Path of the file.
        name: Name of the array.

    Raises:
        InputError: The file is damaged, or the array is missing, not numeric or too large.
    """
    _require_file(path, _MAX_ARRAY_BYTES)
    with open_zip(path) as archive:
        content = read_member(archive, f"{name}.npy", _MAX_ARRAY_BYTES)
    if content is None:
        raise LayoutError(subject=path, expected=f"an array with the name {name}", found="none")
    return parse_npy(content, f"{path}, {name}")


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
        array = np.lib.format.read_array(file, allow_pickle=False)
    except (*HEADER_ERRORS, OverflowError) as error:
        raise LayoutError(subject=where, expected="a NumPy array", found=error) from error
    if array.dtype.kind not in "fiu" or file.read(1):
        found = f"dtype {array.dtype} and {len(content)} bytes"
        raise LayoutError(subject=where, expected="one numeric array", found=found)
    return array.astype(np.float64)


def to_4x4(matrices: npt.NDArray[np.float64], batch: tuple[int, ...], where: Path) -> npt.NDArray[np.float64]:
    """Append the row (0, 0, 0, 1) to matrices.

    Args:
        matrices: Matrices with shape (*batch, 3, 4) or (*batch, 4, 4). If the shape is (*batch, 4, 4), they are not
            changed.
        batch: Expected shape without the last two dimensions.
        where: Path for error messages.

    Returns:
        Matrices with shape (*batch, 4, 4).

    Raises:
        LayoutError: The matrices have an unexpected shape.
    """
    if matrices.shape not in ((*batch, 3, 4), (*batch, 4, 4)):
        expected = f"poses of shape {(*batch, 3, 4)} or {(*batch, 4, 4)}"
        raise LayoutError(subject=where, expected=expected, found=f"the shape {matrices.shape}")
    poses = np.tile(np.eye(4), (*batch, 1, 1))
    poses[..., : matrices.shape[-2], :] = matrices
    return poses


def invert_poses(poses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Invert rigid transforms with shape (..., 4, 4)."""
    inverse = poses.copy()
    rotation = poses[..., :3, :3].swapaxes(-1, -2)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation @ poses[..., :3, 3:])[..., 0]
    return inverse
