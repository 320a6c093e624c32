"""Images from outside: opened with care, and framed as training images are. numpy and PIL only."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from lrm_pl.color_spaces import ColorSpaceError, to_srgb
from lrm_pl.errors import InputError

#: Files that are read; PIL knows many more, of which some run other programs.
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")

#: An image with more bytes or pixels is refused before it is decoded.
MAX_BYTES: Final = 64 << 20
MAX_PIXELS: Final = 64 << 20

#: What PIL answers to a broken image.
DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

#: EXIF's tag of how a camera was held, and what makes its images upright.
_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: TIFF's tags, and values of them.
_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 259, 262, 339
_WHITE_IS_ZERO, _YCBCR = 0, 6
_JPEG_IN_TIFF: Final = (6, 7)

#: Alpha (of 255) above which a pixel belongs to the object.
_SOLID = 127

#: Fraction of an image that an object has at least.
_LEAST_SHARE = 1e-3

#: Longer side of an object, pixels, from which there is something to be seen of it.
_LEAST_SIDE = 8

#: Levels (of 255) that an image's colors span at least where it shows something.
_LEAST_CONTRAST = 8


class ImageError(InputError):
    """A file is no image that can be used; the message says what was expected and what was found."""


class ImageTooLargeError(ImageError):
    """An image has more bytes or pixels than it may have."""


class NotAnImageError(ImageError):
    """A file is something else."""


def open_image(
    source: Path | bytes,
    name: str = "",
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    upright: bool = True,
) -> Image.Image:
    """Open an image that anybody may have made, upright, as sRGB of 8 bits: RGB or RGBA.

    Args:
        source: A file, or its bytes.
        name: What messages call it; the path unless given.
        max_bytes: Most bytes.
        max_pixels: Most pixels.
        upright: Turn it as its EXIF says; False where a camera was computed for the pixels as they are stored.

    Returns:
        The image; RGBA where it has any transparency to it, else RGB.

    Raises:
        ImageError: It is not there, no image, broken, too large, or of a kind whose colors are not known.
    """
    name = name or str(source if isinstance(source, Path) else "the image")
    if isinstance(source, Path):
        if not source.is_file():
            raise ImageError(expected=f"an image at {source}", found="no file", remedy="correct the path")
        size = source.stat().st_size
        try:
            content = source.read_bytes() if size <= max_bytes else b""
        except OSError as error:
            raise ImageError(
                expected=f"an image at {source}", found=f"that it cannot be read: {error}"
            ) from error
    else:
        content, size = source, len(source)
    if size > max_bytes:
        raise ImageTooLargeError(
            subject=name, expected=f"at most {max_bytes} bytes", found=size, remedy="make it smaller"
        )
    _require_pixels(name, webp_size(content), max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we look ourselves
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _require_pixels(name, image.size, max_pixels)
                _prepare(image, content)
                image.load()
                return to_rgb8(image, content, upright=upright)
    except ImageTooLargeError:
        raise
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            subject=name,
            expected=f"at most {max_pixels / 1000000.0:.0f} megapixels",
            found=f"more: {error}",
            remedy="make it smaller",
        ) from error
    except UnidentifiedImageError as error:
        if content[:4] in (b"II*\0", b"MM\0*"):
            raise NotAnImageError(
                subject=name,
                expected="a TIFF format that Pillow supports",
                found="an unsupported one, such as floats",
                remedy="save it with 8 bits per channel",
            ) from error
        raise NotAnImageError(
            subject=name,
            expected=f"an image ({', '.join(FORMATS)})",
            found=f"{size} bytes of something else",
            remedy="convert it",
        ) from error
    except DECODE_ERRORS as error:
        raise ImageError(subject=name, expected="a whole image", found=f"a broken one: {error}") from error


def to_rgb8(image: Image.Image, content: bytes = b"", *, upright: bool = True) -> Image.Image:
    """Turn an image as its EXIF says, and make it sRGB of 8 bits: RGBA where it has any transparency to it, else RGB.

    What it returns has no metadata: whoever reads the orientation again finds the image upright.

    Args:
        image: Any mode but floats and 32 bits.
        content: Its file: PIL reads neither PNG's cICP nor AVIF's nclx (see ``color_spaces``).
        upright: Turn it as its EXIF says.

    Raises:
        ImageError: Its samples have no known white, or its colors cannot be converted to sRGB.
    """
    plain = _eight_bits(image)
    try:
        colors = to_srgb(image, plain.convert("RGB"), content)
    except ColorSpaceError as error:
        raise ImageError(str(error)) from error
    if plain.mode == "RGBA":
        colors.putalpha(plain.getchannel("A"))
    turned = _upright(colors, image) if upright else colors
    turned.info.clear()
    return turned


def webp_size(encoded: bytes) -> tuple[int, int]:
    """Read width and height of a WebP out of its header: Pillow 12 allocates the image when it opens it.

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
    """Say whether an image shows more than an object: most of its edge is opaque.

    A cutout may touch the edge; a screenshot whose corners are round is transparent in the corners alone.
    """
    if image.mode != "RGBA":
        return True
    solid = np.asarray(image.getchannel("A")) > _SOLID
    edge = np.concatenate([solid[0], solid[-1], solid[:, 0], solid[:, -1]])
    return bool(edge.mean() > 0.5)


def without_background(image: Image.Image, remover: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return an image as RGBA without its background; what was transparent stays transparent.

    Args:
        image: RGB or RGBA.
        remover: Makes an RGBA image of an RGB one.
    """
    alpha = image.convert("RGBA").getchannel("A")
    white = Image.new("RGB", image.size, "white")
    white.paste(image.convert("RGB"), mask=alpha)  # colors under transparent pixels may be anything
    removed = remover(white)
    removed.putalpha(ImageChops.multiply(removed.getchannel("A"), alpha))
    return removed


def is_plain(image: Image.Image) -> bool:
    """Say whether an image shows one color only, as where a lens was covered."""
    return int(np.ptp(np.asarray(image.convert("RGB")), axis=(0, 1)).max()) <= _LEAST_CONTRAST


def has_object(image: Image.Image) -> bool:
    """Say whether a thousandth or more of an RGBA image is more than half opaque.

    Where a photo shows nothing, its background's remover, whose masks reach from 0 to 1 always, leaves a few specks.
    """
    return float((np.asarray(image.getchannel("A")) > _SOLID).mean()) >= _LEAST_SHARE


def framed(image: Image.Image, foreground: float, side: int) -> Image.Image:
    """Cut an object out of its image, and place it as training images show objects.

    The middle of its bounding box comes to the middle of a square, its longer side takes a share of the square's.

    Args:
        image: RGBA, straight alpha.
        foreground: That share.
        side: Side of the square, pixels.

    Returns:
        A square RGBA image, straight alpha.

    Raises:
        ImageError: Everything in it is transparent, or the object has next to no pixels.
    """
    rgba = np.asarray(image, dtype=np.float32) / 255
    box = object_box(rgba[..., 3])
    if box is None:
        raise ImageError(
            expected="an object in the image", found="alpha 0 everywhere", remedy="check its alpha channel"
        )
    top, left, bottom, right = box
    if max(bottom - top, right - left) < _LEAST_SIDE:
        raise ImageError(
            expected=f"an object of {_LEAST_SIDE} pixels or more",
            found=f"one of {right - left} x {bottom - top}",
            remedy="give a larger image",
        )
    scale = foreground * side / max(bottom - top, right - left)
    middle = (top + bottom) / 2, (left + right) / 2
    # With a little around it, where alpha is soft. No more: a square around a long thin object has no bounds.
    soft = 2 + max(bottom - top, right - left) // 50
    top, left = max(0, top - soft), max(0, left - soft)
    rgba = rgba[top : bottom + soft, left : right + soft]
    place = round(side / 2 + (top - middle[0]) * scale), round(side / 2 + (left - middle[1]) * scale)
    # Colors count as much as they are seen: what alpha hides must not come in from the edges.
    premultiplied = (*np.moveaxis(rgba[..., :3] * rgba[..., 3:], -1, 0), rgba[..., 3])
    channels = [_placed(channel, scale, place, side) for channel in premultiplied]
    red, green, blue, alpha = (channel.clip(0, 1) for channel in channels)
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


def _placed(channel: np.ndarray, scale: float, place: tuple[int, int], side: int) -> np.ndarray:
    """Put a channel, in another size, into an empty square; what does not fit is cut off."""
    height, width = (max(1, round(length * scale)) for length in channel.shape)
    resized = np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
    square = np.zeros((side, side), dtype=np.float32)
    top, left = max(0, place[0]), max(0, place[1])
    part = resized[top - place[0] :, left - place[1] :][: side - top, : side - left]
    square[top : top + part.shape[0], left : left + part.shape[1]] = part
    return square


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Turn an image as the EXIF of the one that it was made of says; broken EXIF turns nothing."""
    try:
        orientation = opened.getexif().get(_ORIENTATION)
    except (*DECODE_ERRORS, AttributeError):
        return image
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _require_pixels(name: str, size: tuple[int, int], most: int) -> None:
    if size[0] * size[1] > most:
        raise ImageTooLargeError(
            subject=name,
            expected=f"at most {most / 1000000.0:.0f} megapixels",
            found=f"{size[0]} x {size[1]}",
            remedy="make it smaller",
        )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Make an image RGB or RGBA of 8 bits; its colors stay in their color space.

    Raises:
        ImageError: Its samples have no known white: floats, 32 bits or signed.
    """
    tags = getattr(image, "tag_v2", {})  # TIFF's
    if image.mode in ("F", "I") or 2 in tags.get(_SAMPLE_FORMAT, ()):
        kind = "floats" if image.mode == "F" else "signed integers or 32 bits"
        raise ImageError(
            expected="8 or 16 bits a channel",
            found=f"{kind}, whose white level is unknown",
            remedy="export it with 8 bits",
        )
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        white = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
        gray = np.rint(values.astype(np.float32) * (255 / white)).clip(0, 255).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # PIL inverts 8 bits alone
            gray = 255 - gray
        colors = Image.fromarray(gray).convert("RGB")
        if "transparency" in image.info:
            colors.putalpha(
                Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
            )
        return colors
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _prepare(image: Image.Image, content: bytes) -> None:
    """Correct what PIL says of a file that it has opened and not yet decoded.

    Raises:
        ImageError: PIL would decode it to something else than it shows.
    """
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _YCBCR and tags.get(_COMPRESSION) not in _JPEG_IN_TIFF:
        raise ImageError(
            expected="RGB in a TIFF without JPEG compression", found="YCbCr", remedy="export it as RGB"
        )
    if image.format != "PNG" or "transparency" not in image.info:
        return
    bits = content[24]
    if image.mode == "RGB" and bits == 16:  # PIL keeps the upper halves alone, which several colors share
        raise ImageError(
            expected="8 bits a channel in a PNG with a transparent color (tRNS)",
            found="16",
            remedy="export it with an alpha channel",
        )
    if image.mode == "L" and bits < 8:  # PIL scales the pixels and forgets their transparent value
        image.info["transparency"] *= 255 // ((1 << bits) - 1)
