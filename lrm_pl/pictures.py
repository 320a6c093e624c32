"""Pictures from outside: opened with care, and framed as training pictures are. numpy and PIL only."""

import io
import warnings
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lrm_pl.errors import InputError

#: Files that are read; PIL knows many more, of which some run other programs.
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")

#: A picture with more bytes or pixels is refused before it is decoded.
MAX_BYTES: Final = 64 << 20
MAX_PIXELS: Final = 64 << 20

#: What PIL answers to a broken picture.
PICTURE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError)

#: Alpha (of 255) above which a pixel belongs to the object.
_SOLID = 127


class PictureError(InputError):
    """A file is no picture that can be used; the message says what was expected and what was found."""


class PictureTooLargeError(PictureError):
    """A picture has more bytes or pixels than it may have."""


class NotAPictureError(PictureError):
    """A file is something else."""


def open_picture(
    source: Path | bytes, name: str = "", *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Open a picture that anybody may have made, upright, as RGB or RGBA of 8 bits.

    Args:
        source: A file, or its bytes.
        name: What messages call it; the path unless given.
        max_bytes: Most bytes.
        max_pixels: Most pixels.

    Returns:
        The picture, turned as its EXIF says; RGBA where it has any transparency to it, else RGB.

    Raises:
        PictureError: It is not there, no picture, broken, or too large.
    """
    name = name or str(source if isinstance(source, Path) else "the picture")
    if isinstance(source, Path):
        if not source.is_file():
            raise PictureError(f"expected a picture at {source}, found no file; correct the path")
        size = source.stat().st_size
        content = source.read_bytes() if size <= max_bytes else b""
    else:
        content, size = source, len(source)
    if size > max_bytes:
        raise PictureTooLargeError(
            f"{name}: expected at most {max_bytes} bytes, found {size}; make it smaller"
        )
    _require_pixels(name, webp_size(content), max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we look ourselves
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _require_pixels(name, image.size, max_pixels)
                image.load()
                return _eight_bits(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureTooLargeError(
            f"{name}: expected at most {max_pixels / 1e6:.0f} megapixels, found more: {error}; make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise NotAPictureError(
            f"{name}: expected a picture ({', '.join(FORMATS)}), found {size} bytes of something else; convert it"
        ) from error
    except PICTURE_ERRORS as error:
        raise PictureError(f"{name}: expected a whole picture, found a broken one: {error}") from error


def webp_size(encoded: bytes) -> tuple[int, int]:
    """Read width and height of a WebP out of its header: Pillow 12 allocates the picture when it opens it.

    Returns:
        The size; (0, 0) where it is no WebP.
    """
    if encoded[8:12] != b"WEBP":
        return 0, 0
    if encoded[12:16] == b"VP8X":
        return int.from_bytes(encoded[24:27], "little") + 1, int.from_bytes(encoded[27:30], "little") + 1
    if encoded[12:16] == b"VP8L":
        bits = int.from_bytes(encoded[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    lossy = (int.from_bytes(encoded[start : start + 2], "little") & 0x3FFF for start in (26, 28))
    return next(lossy), next(lossy)


def has_background(image: Image.Image) -> bool:
    """Say whether a picture shows more than an object: nothing of it is transparent."""
    return image.mode != "RGBA" or int(np.asarray(image.getchannel("A")).min()) > _SOLID


def framed(image: Image.Image, foreground: float, side: int) -> Image.Image:
    """Cut an object out of its picture, and place it as training pictures show objects.

    The middle of its bounding box comes to the middle of a square, its longer side takes a share of the square's.

    Args:
        image: RGBA, straight alpha.
        foreground: That share.
        side: Side of the square, pixels.

    Returns:
        A square RGBA picture, straight alpha.

    Raises:
        PictureError: Everything in it is transparent.
    """
    rgba = np.asarray(image, dtype=np.float32) / 255
    box = object_box(rgba[..., 3])
    if box is None:
        raise PictureError(
            "expected an object in the picture, found alpha 0 everywhere; check its alpha channel"
        )
    top, left, bottom, right = box
    length = max(bottom - top, right - left) / foreground
    x, y = (left + right) / 2 - length / 2, (top + bottom) / 2 - length / 2
    # Colours count as much as they are seen: what alpha hides must not come in from the edges.
    premultiplied = (*np.moveaxis(rgba[..., :3] * rgba[..., 3:], -1, 0), rgba[..., 3])
    channels = [_square(channel, x, y, length, side) for channel in premultiplied]
    red, green, blue, alpha = (np.asarray(channel).clip(0, 1) for channel in channels)
    straight = np.stack([red, green, blue], axis=-1) / np.maximum(alpha, 1e-6)[..., None]
    square = np.concatenate([straight.clip(0, 1), alpha[..., None]], axis=-1)
    square[alpha < 0.5 / 255] = 0
    return Image.fromarray(np.rint(square * 255).astype(np.uint8), mode="RGBA")


def object_box(alpha: np.ndarray) -> tuple[int, int, int, int] | None:
    """Find top, left, bottom and right of what is more than half opaque, or else of what is anything; None: nothing.

    Args:
        alpha: (H, W) in [0, 1].
    """
    for least in (_SOLID / 255, 0.0):
        seen = alpha > least
        if seen.any():
            rows, columns = np.nonzero(seen.any(axis=1))[0], np.nonzero(seen.any(axis=0))[0]
            return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
    return None


def _square(channel: np.ndarray, x: float, y: float, length: float, side: int) -> Image.Image:
    """Take a square out of a picture, 0 outside of it, in another size."""
    margin = int(np.ceil(max(0.0, -x, -y, x + length - channel.shape[1], y + length - channel.shape[0])))
    padded = Image.fromarray(np.pad(channel, margin))
    box = (x + margin, y + margin, x + margin + length, y + margin + length)
    return padded.resize((side, side), Image.Resampling.BILINEAR, box=box)


def _require_pixels(name: str, size: tuple[int, int], most: int) -> None:
    if size[0] * size[1] > most:
        raise PictureTooLargeError(
            f"{name}: expected at most {most / 1e6:.0f} megapixels, found {size[0]} x {size[1]}; make it smaller"
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits
        grey = np.asarray(image, dtype=np.float64)
        return Image.fromarray(
            (grey / (65535 if grey.max(initial=0) > 255 else 255) * 255).astype(np.uint8)
        ).convert("RGB")
    transparent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
    return image.convert("RGBA" if transparent else "RGB")
