"""Depth and normals of views, stored as images in the optional members ``depth_000.png`` and ``normal_000.png``.

Depth and normals describe the first surface at the center of each pixel, which may be transparent. They are 0 at pixels
whose center is not covered by a surface. Such pixels have zero or partial alpha.
"""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from lrm_pl.data.schema import MAX_DEPTH, MAX_IMAGE_SIDE, SampleError
from lrm_pl.images import DECODE_ERRORS

#: Smallest valid depth in scene units.
MIN_DEPTH = 1e-3

#: Pixel value that represents ``MAX_DEPTH``.
_FULL = 65535

#: Tolerance of the length of normals. Rounding to 8 bits causes errors of up to 0.007.
_UNIT_TOLERANCE = 0.02

#: Prefix of a member name -> Pillow mode.
_MODES = {"depth": "I;16", "normal": "RGB"}


def depth_member(view: int) -> str:
    """Return the name of the member with the depth of a view, for example ``depth_003.png``."""
    return f"depth_{view:03d}.png"


def normal_member(view: int) -> str:
    """Return the name of the member with the normals of a view, for example ``normal_003.png``."""
    return f"normal_{view:03d}.png"


def encode_depth(depth: npt.NDArray[np.floating]) -> bytes:
    """Encode the depth of a view deterministically.

    Args:
        depth: (H, W) depth along the z axis of the camera in scene units, or 0 where there is no surface.

    Returns:
        PNG bytes.

    Raises:
        SampleError: A depth is neither 0 nor between ``MIN_DEPTH`` and ``MAX_DEPTH``.
    """
    seen = depth != 0
    if not ((depth[seen] >= MIN_DEPTH) & (depth[seen] <= MAX_DEPTH)).all():
        raise SampleError(
            expected=f"depths that are 0 or between {MIN_DEPTH} and {MAX_DEPTH}",
            found=f"depths from {depth[seen].min()} to {depth[seen].max()}",
        )
    return write_pixels(np.rint(depth.astype(np.float64) / MAX_DEPTH * _FULL).astype(np.uint16))


def decode_depth(key: str, name: str, encoded: bytes) -> npt.NDArray[np.float32]:
    """Decode the depth of a view.

    Args:
        key: Key of the sample for error messages.
        name: Name of the member, for example ``depth_003.png``.
        encoded: PNG bytes.

    Returns:
        (H, W) depth along the z axis of the camera in scene units, or 0 where there is no surface.

    Raises:
        SampleError: The member is not a depth image or is too large, or a depth is smaller than ``MIN_DEPTH``.
    """
    depth = read_pixels(key, name, encoded).astype(np.float64) / _FULL * MAX_DEPTH
    rounding = MAX_DEPTH / _FULL / 2
    if ((depth > 0) & (depth < MIN_DEPTH - rounding)).any():
        raise SampleError(
            subject=f"sample {key!r}",
            expected=f"depths that are 0 or between {MIN_DEPTH} and {MAX_DEPTH} in {name}",
            found=f"a depth of {depth[depth > 0].min():.2g}",
        )
    return depth.astype(np.float32)


def encode_normals(normals: npt.NDArray[np.floating]) -> bytes:
    """Encode the normals of a view deterministically.

    Args:
        normals: (H, W, 3) unit normals in world space, or 0 where there is no surface.

    Returns:
        PNG bytes.

    Raises:
        SampleError: The length of a normal is neither 0 nor 1.
    """
    length = np.linalg.norm(normals, axis=-1)
    seen = length != 0
    if not (np.abs(length[seen] - 1) < _UNIT_TOLERANCE).all():
        raise SampleError(expected="normals of length 0 or 1", found=f"a length of {length[seen].min()}")
    pixels = np.rint((normals.astype(np.float64) + 1) / 2 * 255)
    return write_pixels(np.where(seen[..., None], pixels, 0).clip(0, 255).astype(np.uint8))


def decode_normals(key: str, name: str, encoded: bytes) -> npt.NDArray[np.float32]:
    """Decode the normals of a view.

    Args:
        key: Key of the sample for error messages.
        name: Name of the member, for example ``normal_003.png``.
        encoded: PNG bytes.

    Returns:
        (H, W, 3) unit normals in world space, or 0 where there is no surface.

    Raises:
        SampleError: The member is not an image of normals or is too large.
    """
    pixels = read_pixels(key, name, encoded)
    seen = pixels.any(axis=-1)
    normals = pixels.astype(np.float64) / 255 * 2 - 1
    length = np.linalg.norm(normals, axis=-1)
    wrong = seen & (np.abs(length - 1) > _UNIT_TOLERANCE)
    if wrong.any():
        raise SampleError(
            subject=f"sample {key!r}",
            expected=f"normals of length 0 or 1 in {name}",
            found=f"a length of {length[wrong][0]:.3g}",
        )
    length[~seen] = np.inf
    return (normals / length[..., None]).astype(np.float32)


def read_pixels(key: str, name: str, encoded: bytes) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint16]:
    """Decode the pixel values of a depth or normal image.

    Args:
        key: Key of the sample for error messages.
        name: Name of the member.
        encoded: PNG bytes.

    Returns:
        (H, W) uint16 values of a depth image, or (H, W, 3) uint8 values of a normal image.

    Raises:
        SampleError: The member is not a depth or normal image, or is too large.
    """
    mode = _MODES[name.partition("_")[0]]
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
            if image.mode == mode and max(image.size) <= MAX_IMAGE_SIDE:
                return np.array(image)
            found = f"mode {image.mode} and size {image.size}"
    except DECODE_ERRORS as error:
        found = f"{len(encoded)} bytes: {error}"
    raise SampleError(
        subject=f"sample {key!r}",
        expected=f"a PNG of mode {mode} with at most {MAX_IMAGE_SIDE} pixels per side in {name}",
        found=found,
    )


def write_pixels(pixels: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    """Encode pixel values as PNG deterministically. This is the inverse of ``read_pixels``."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
