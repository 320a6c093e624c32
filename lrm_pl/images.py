"""Functions to open untrusted image files and to frame objects as in training images, using only numpy and PIL."""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from lrm_pl.color_spaces import ColorSpaceError, to_srgb
from lrm_pl.errors import InputError, error_subject

#: Supported file formats. PIL supports more formats, some of which run external programs.
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")

#: Size limits, which are checked before an image is decoded.
MAX_BYTES: Final = 64 << 20
MAX_PIXELS: Final = 64 << 20

#: Exceptions that PIL raises for a damaged image.
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

#: Values of TIFF tags.
_WHITE_IS_ZERO, _YCBCR = 0, 6
_JPEG_IN_TIFF: Final = (6, 7)

#: Alpha on a scale of 0 to 255 above which a pixel belongs to the object.
_SOLID = 127

#: Minimum fraction of opaque pixels of an image with an object.
_MIN_FRACTION = 1e-3

#: Minimum of the longer side of an object in pixels.
_MIN_SIDE = 8

#: Maximum range of the colors of a uniform image, on a scale of 0 to 255.
_UNIFORM_RANGE = 8


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


class ImageError(InputError):
    """Error raised if an image is missing, damaged, unsupported or unusable."""


class ImageTooLargeError(ImageError):
    """Error raised if an image exceeds the maximum number of bytes or pixels."""


class NotAnImageError(ImageError):
    """Error raised if a file is not an image of a supported format."""


def open_image(
    source: Path | bytes,
    name: str = "",
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    upright: bool = True,
) -> Image.Image:
    """Open an untrusted image as an 8-bit sRGB image.

    Args:
        source: Path or content of the file.
        name: Name of the image in error messages. If empty, the path is used.
        max_bytes: Maximum number of bytes.
        max_pixels: Maximum number of pixels.
        upright: Whether to apply the EXIF orientation. Pass False if camera parameters refer to the stored pixels.

    Returns:
        An RGBA image if the file has transparency, or an RGB image otherwise.

    Raises:
        ImageError: The file is missing, damaged or too large, or has an unsupported format or color space.
    """
    with error_subject(name or (source if isinstance(source, Path) else "the image")):
        content = source if isinstance(source, bytes) else _read_file(source, max_bytes)
        if len(content) > max_bytes:
            raise ImageTooLargeError(
                f"a file of at most {max_bytes} bytes", "a larger file", remedy="reduce the size of the image"
            )
        try:
            return _decode(content, max_pixels, upright=upright)
        except UnidentifiedImageError as error:
            is_tiff = content[:4] in (b"II*\0", b"MM\0*")
            raise NotAnImageError(
                expected=f"an image ({', '.join(FORMATS)})",
                found=f"{'a TIFF' if is_tiff else f'{len(content)} bytes'} of an unknown format",
                remedy="convert the image to PNG with 8 bits per channel",
            ) from error
        except InputError:
            raise
        except DECODE_ERRORS as error:
            raise ImageError(expected="an intact image", found=f"a damaged image: {error}") from error


def _read_file(path: Path, max_bytes: int) -> bytes:
    """Read at most ``max_bytes`` + 1 bytes of a file."""
    try:
        if not path.is_file():
            raise ImageError(expected="an image file", found="no file", remedy="correct the path")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise ImageError(expected="a readable image file", found=error) from error


def _decode(content: bytes, max_pixels: int, *, upright: bool) -> Image.Image:
    """Decode an image of at most ``max_pixels`` pixels."""
    _require_pixels(webp_size(content), max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # checked by _require_pixels
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise _too_many_pixels(max_pixels, f"a larger image: {error}") from error
    with image:
        _require_pixels(image.size, max_pixels)
        _prepare(image, content)
        image.load()
        return to_rgb8(image, content, upright=upright)


def to_rgb8(image: Image.Image, content: bytes = b"", *, upright: bool = True) -> Image.Image:
    """Convert an image to 8-bit sRGB without metadata, as RGBA if it has transparency and as RGB otherwise.

    Args:
        image: Image with unsigned integers of at most 16 bits per channel.
        content: Content of the file, for color spaces that PIL does not read (see ``color_spaces``).
        upright: Whether to apply the EXIF orientation.

    Raises:
        ImageError: The white level is unknown, or the colors cannot be converted to sRGB.
    """
    plain = _eight_bits(image)
    try:
        colors = to_srgb(image, plain.convert("RGB"), content)
    except ColorSpaceError as error:
        raise ImageError(str(error)) from error
    if plain.mode == "RGBA":
        colors.putalpha(plain.getchannel("A"))
    if upright:
        colors.info = image.info.copy()
        with contextlib.suppress(*DECODE_ERRORS, AttributeError):  # damaged EXIF data is ignored
            ImageOps.exif_transpose(colors, in_place=True)
    colors.info.clear()
    return colors


def webp_size(encoded: bytes) -> tuple[int, int]:
    """Return the width and height in a WebP header, or (0, 0) if the content is not WebP.

    The header is read separately because Pillow 12 allocates the image when it opens the file.
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
    """Return whether an image has a background, that is, whether more than half of the border pixels are opaque.

    The border of a cutout may be partly opaque, and a screenshot may have transparent corners.
    """
    if image.mode != "RGBA":
        return True
    solid = np.asarray(image.getchannel("A")) > _SOLID
    edge = np.concatenate([solid[0], solid[-1], solid[:, 0], solid[:, -1]])
    return bool(edge.mean() > 0.5)


def remove_background(image: Image.Image, remover: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Remove the background of an image. Transparent pixels stay transparent.

    Args:
        image: RGB or RGBA image.
        remover: Function that maps an RGB image to an RGBA image with a transparent background.

    Returns:
        RGBA image with a transparent background.
    """
    alpha = image.convert("RGBA").getchannel("A")
    white = Image.new("RGB", image.size, "white")
    white.paste(image.convert("RGB"), mask=alpha)  # colors of transparent pixels are undefined
    removed = remover(white)
    removed.putalpha(ImageChops.multiply(removed.getchannel("A"), alpha))
    return removed


def is_uniform(image: Image.Image) -> bool:
    """Return whether an image has a uniform color, for example, because the lens was covered."""
    return int(np.ptp(np.asarray(image.convert("RGB")), axis=(0, 1)).max()) <= _UNIFORM_RANGE


def has_object(image: Image.Image) -> bool:
    """Return whether at least 0.1% of the pixels of an RGBA image are more than half opaque.

    Background removal normalizes masks to [0, 1], so a few pixels remain opaque even if there is no object.
    """
    return float((np.asarray(image.getchannel("A")) > _SOLID).mean()) >= _MIN_FRACTION


def frame_object(image: Image.Image, foreground: float, side: int) -> Image.Image:
    """Center and scale an object in a square image, as in the training images.

    Args:
        image: RGBA image with straight alpha.
        foreground: Longer side of the bounding box of the object as a fraction of the side of the square.
        side: Side of the square in pixels.

    Returns:
        Square RGBA image with straight alpha.

    Raises:
        ImageError: The image is fully transparent, or the object is too small.
    """
    box = object_box(np.asarray(image.getchannel("A"), dtype=np.float32) / 255)
    if box is None:
        raise ImageError(
            expected="an object in the image",
            found="alpha 0 everywhere",
            remedy="check the alpha channel of the image",
        )
    left, top, right, bottom = box
    longest = max(right - left, bottom - top)
    if longest < _MIN_SIDE:
        raise ImageError(
            expected=f"an object of at least {_MIN_SIDE} pixels",
            found=f"{right - left} x {bottom - top} pixels",
            remedy="use a larger image",
        )
    scale = foreground * side / longest
    # The margin keeps soft alpha. A square crop around a long thin object could exceed the memory.
    margin = 2 + longest // 50
    crop_left, crop_top = max(0, left - margin), max(0, top - margin)
    crop = image.crop(
        (crop_left, crop_top, min(right + margin, image.width), min(bottom + margin, image.height))
    )
    size = max(1, round(crop.width * scale)), max(1, round(crop.height * scale))
    # Pillow resizes premultiplied colors, so that colors of transparent pixels do not bleed into the object.
    resized = crop.resize(size, Image.Resampling.BILINEAR)
    offset_x = round(side / 2 + (crop_left - (left + right) / 2) * scale)
    offset_y = round(side / 2 + (crop_top - (top + bottom) / 2) * scale)
    square = Image.new("RGBA", (side, side))
    square.paste(resized, (offset_x, offset_y))
    return square


def object_box(alpha: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return the bounding box (left, top, right, bottom) of the pixels that are more than half opaque.

    If no pixel is more than half opaque, all pixels with alpha above 0 are used. If the image is fully transparent,
    None is returned.

    Args:
        alpha: Alpha channel of shape (H, W) in [0, 1].
    """
    solid, visible = (Image.fromarray(alpha > threshold) for threshold in (_SOLID / 255, 0))
    return solid.getbbox() or visible.getbbox()


def _require_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise _too_many_pixels(max_pixels, f"{size[0]} x {size[1]} pixels")


def _too_many_pixels(max_pixels: int, found: str) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"an image of at most {max_pixels / 1e6:.0f} megapixels", found, remedy="reduce the size of the image"
    )


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB or RGBA without changing the color space.

    Raises:
        ImageError: The pixels are floats, 32-bit integers or signed integers, whose white level is unknown.
    """
    tags = getattr(image, "tag_v2", {})  # tags of TIFF
    if image.mode in ("F", "I") or 2 in tags.get(Base.SampleFormat, ()):
        samples = "floats" if image.mode == "F" else "signed or 32-bit integers"
        found = f"{samples}, whose white level is unknown"
        raise ImageError("8 or 16 bits per channel", found, "export the image with 8 bits per channel")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        white = 4095 if tags.get(Base.BitsPerSample) == (12,) else 65535
        gray = np.rint(values.astype(np.float32) * (255 / white)).clip(0, 255).astype(np.uint8)
        if tags.get(Base.PhotometricInterpretation) == _WHITE_IS_ZERO:  # PIL inverts only 8-bit images
            gray = 255 - gray
        colors = Image.fromarray(gray).convert("RGB")
        if "transparency" in image.info:
            colors.putalpha(Image.fromarray((values != image.info["transparency"]) * np.uint8(255)))
        return colors
    if image.mode == "La":
        image = image.convert("LA")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _prepare(image: Image.Image, content: bytes) -> None:
    """Correct the metadata of a file that PIL has opened but not decoded.

    Raises:
        ImageError: PIL would decode the image incorrectly.
    """
    tags = getattr(image, "tag_v2", {})
    if tags.get(Base.PhotometricInterpretation) == _YCBCR and tags.get(Base.Compression) not in _JPEG_IN_TIFF:
        raise ImageError("RGB in a TIFF without JPEG compression", "YCbCr", "export the image as RGB")
    if image.format != "PNG" or "transparency" not in image.info:
        return
    bits = content[24]
    if image.mode == "RGB" and bits == 16:  # PIL drops the lower bytes, so several colors become transparent
        raise ImageError(
            expected="8 bits per channel in a PNG with a transparent color (tRNS)",
            found="16 bits per channel",
            remedy="export the image with an alpha channel",
        )
    if image.mode == "L" and bits < 8:  # PIL scales the pixels, but not the transparent value
        image.info["transparency"] *= 255 // ((1 << bits) - 1)
