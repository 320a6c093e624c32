"""Conversion of images from the color space declared in the file to 8-bit sRGB, using only numpy and PIL.

Supported declarations are ICC profiles, the cICP, sRGB, gAMA and cHRM chunks of PNG, the nclx property of AVIF, the
V4 and V5 headers of BMP, and EXIF and TIFF tags. A declaration that is damaged or does not match the mode of the image
is ignored, as in browsers. If there is no declaration, colors are assumed to be sRGB, and CMYK is assumed to be the
complement of sRGB. If an AVIF contains several nclx properties, the first one is used. A 16-bit PNG with a declared
transfer function is converted before colors are rounded to 8 bits. ICC profiles are applied to 8-bit colors.
"""

import dataclasses
import io
import math
import re
import struct
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms

from lrm_pl.errors import InputError

_D65: Final = (0.3127, 0.3290)
_BT709: Final = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, *_D65)

#: CIE 1931 xy of red, green, blue and white by code (ITU-T H.273, table 2). Code 2 means unspecified.
_PRIMARIES: Final = {
    1: _BT709,
    2: _BT709,
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, *_D65),  # BT.601, 625 lines
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65),  # BT.601, 525 lines
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65),  # BT.2020
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65),  # Display P3
}

#: Exponents by code, or None for the sRGB curve (ITU-T H.273, table 3). The codes 1, 6, 14 and 15 (BT.601, BT.709 and
#: BT.2020) define curves of cameras. Browsers display such images with the sRGB curve.
_TRANSFERS: Final = dict.fromkeys((1, 2, 6, 13, 14, 15)) | {4: 2.2, 5: 2.8, 8: 1.0}
_HDR: Final = {16: "PQ, which is HDR", 18: "HLG, which is HDR"}

#: Matrix from XYZ to cone responses (Bradford).
_CONES: Final = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

_GRAY_MODES: Final = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N")

_PNG: Final = b"\x89PNG\r\n\x1a\n"

#: Maximum difference, on a scale of 0 to 255, that counts as rounding.
_ROUNDING: Final = 1

#: Number of rows that are converted at a time, which bounds the memory.
_ROWS: Final = 256

#: Regular expressions of a cICP chunk of PNG and of the H.273 codes in an AVIF.
_CICP: Final = re.compile(rb"\0\0\0\x04cICP(.{4})", re.DOTALL)
_NCLX: Final = re.compile(rb"colrnclx(.{4})", re.DOTALL)

Converter = Callable[[Image.Image], Image.Image]


class ColorSpaceError(InputError):
    """Error raised if the colors of an image cannot be converted to sRGB."""


@dataclasses.dataclass(frozen=True)
class ColorSpace:
    """An RGB color space.

    Attributes:
        xy: CIE 1931 chromaticities x and y of red, green, blue and white.
        gamma: Exponent of the conversion from stored to linear values, or None for the sRGB curve.
    """

    xy: tuple[float, ...] = _BT709
    gamma: float | None = None


SRGB: Final = ColorSpace()
ADOBE_RGB: Final = ColorSpace((0.64, 0.33, 0.21, 0.71, 0.15, 0.06, *_D65), 563 / 256)


def srgb_to_linear(srgb: npt.ArrayLike) -> npt.NDArray[np.floating]:
    """Convert sRGB in [0, 1] to linear RGB (IEC 61966-2-1)."""
    srgb = np.asarray(srgb)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: npt.ArrayLike) -> npt.NDArray[np.floating]:
    """Convert linear RGB in [0, 1] to sRGB (IEC 61966-2-1)."""
    linear = np.asarray(linear)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def to_srgb(image: Image.Image, rgb: Image.Image, content: bytes = b"") -> Image.Image:
    """Convert an image from the color space declared in the file to sRGB.

    Args:
        image: Image as opened by PIL, with its original mode and metadata.
        rgb: Stored colors as 8-bit RGB.
        content: Content of the file, for declarations that PIL does not read (cICP, nclx, BMP headers). May be empty.

    Returns:
        8-bit RGB image, which is ``rgb`` if the stored colors are sRGB up to rounding.

    Raises:
        ColorSpaceError: The color space cannot be converted, for example, because it is HDR.
    """
    space = _png_codes(content)  # takes precedence over a profile (PNG specification)
    profile = _profile(image, content)
    if space is None and profile:
        converted = _by_profile(image, rgb, profile)
        if converted is not None:
            return converted
    space = space or _declared_space(image, content)
    return rgb if space in (None, SRGB) else _by_space(rgb, space, _sixteen_bits(image, content))


def is_srgb(image: Image.Image, content: bytes) -> bool:
    """Return whether an image declares sRGB or no color space. The arguments are the same as for ``to_srgb``.

    Raises:
        ColorSpaceError: The color space cannot be converted.
    """
    space = _png_codes(content) or _declared_space(image, content)
    return _profile(image, content) is None and space in (None, SRGB)


def _declared_space(image: Image.Image, content: bytes) -> ColorSpace | None:
    """Return the color space declared by nclx, PNG chunks or EXIF, in this order of precedence, or None."""
    return _avif_codes(content) or _png_gamma(image) or _exif_space(image)


def _sixteen_bits(image: Image.Image, content: bytes) -> npt.NDArray[np.uint16] | None:
    """Return the (H, W, 3) 16-bit colors of a 16-bit PNG, which PIL reduces to 8 bits, or None for other images."""
    if not content.startswith(_PNG) or content[24] != 16:
        return None
    if image.mode.startswith("I;16"):
        return np.repeat(np.asarray(image, dtype=np.uint16)[..., None], 3, axis=-1)
    if image.mode not in ("RGB", "RGBA"):
        return None
    with Image.open(io.BytesIO(content), formats=("PNG",)) as lower:
        # In this mode, PIL keeps the second byte of each sample, which is the lower byte in a PNG.
        lower.tile = [tile._replace(args=f"{lower.mode};16L") for tile in lower.tile]
        upper, low = (np.asarray(half)[..., :3].astype(np.uint16) for half in (image, lower))
    return np.bitwise_or(upper << np.uint16(8), low)


def _by_space(rgb: Image.Image, space: ColorSpace, deep: npt.NDArray[np.uint16] | None = None) -> Image.Image:
    """Convert colors from a color space to sRGB.

    Args:
        rgb: 8-bit colors.
        space: Color space of the colors.
        deep: 16-bit version of the colors, if available.
    """
    try:
        matrix = (np.linalg.inv(_to_xyz(_BT709)) @ _to_xyz(space.xy)).astype(np.float32)
    except np.linalg.LinAlgError:  # the primaries are collinear, or there is no white
        return rgb
    light = np.arange(1 << 16) / 65535
    encoded = np.rint(linear_to_srgb(light) * 255).astype(np.uint8)

    def convert(image: Image.Image) -> Image.Image:
        stored = deep if deep is not None and image is rgb else np.asarray(image)
        codes = np.linspace(0, 1, np.iinfo(stored.dtype).max + 1)
        linear = (srgb_to_linear(codes) if space.gamma is None else codes**space.gamma).astype(np.float32)
        converted = np.empty_like(stored, dtype=np.uint8)
        for top in range(0, len(stored), _ROWS):
            part = linear[stored[top : top + _ROWS]] @ matrix.T
            converted[top : top + _ROWS] = encoded[np.rint(part.clip(0, 1) * 65535).astype(np.uint16)]
        return Image.fromarray(converted)

    return _unless_rounding(rgb, convert)


def _to_xyz(xy: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Return the (3, 3) matrix from linear RGB to XYZ, adapted to D65."""
    points = np.array(xy, dtype=np.float64).reshape(4, 2)
    columns = np.concatenate([points, 1 - points.sum(axis=1, keepdims=True)], axis=1).T
    if not np.isfinite(columns).all() or columns[1, 3] <= 0:
        raise np.linalg.LinAlgError
    white = columns[:, 3] / columns[1, 3]
    matrix = columns[:, :3] * np.linalg.solve(columns[:, :3], white)
    d65 = np.array([_D65[0], _D65[1], 1 - sum(_D65)]) / _D65[1]
    return np.linalg.inv(_CONES) @ np.diag(_CONES @ d65 / (_CONES @ white)) @ _CONES @ matrix


def _unless_rounding(image: Image.Image, convert: Converter) -> Image.Image:
    """Convert an image to sRGB, or only to the mode RGB if the conversion would change colors only by rounding."""
    levels = np.linspace(0, 255, 18).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 18, 3)
    if image.mode == "L":
        grid = np.arange(256, dtype=np.uint8)[None]
    if image.mode == "CMYK":
        return convert(image)
    colors = Image.fromarray(grid)
    before, after = (np.asarray(c, dtype=np.int16) for c in (colors.convert("RGB"), convert(colors)))
    return image.convert("RGB") if np.abs(after - before).max() <= _ROUNDING else convert(image)


def _by_profile(image: Image.Image, rgb: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert an image with an ICC profile. Return None if the profile is damaged or does not match the image."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space)
        if mode is None or (mode == "CMYK") != (image.mode == "CMYK"):
            return None
        if mode == "L" and image.mode not in _GRAY_MODES:
            return None
        srgb = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
        return _unless_rounding(image if mode == "CMYK" else rgb.convert(mode), transform.apply)
    except (ImageCms.PyCMSError, OSError):
        return None


def _unsupported(expected: str, found: str) -> ColorSpaceError:
    return ColorSpaceError(expected, found, remedy="export the image as sRGB")


def _coded(primaries: int, transfer: int) -> ColorSpace | None:
    """Return the color space with the given codes of ITU-T H.273, or None if both codes are unspecified."""
    if primaries == transfer == 2:
        return None
    if primaries in _PRIMARIES and transfer in _TRANSFERS:
        return ColorSpace(_PRIMARIES[primaries], _TRANSFERS[transfer])
    codes = f"color primaries {primaries} and transfer characteristics {transfer} of H.273"
    raise _unsupported("colors that can be converted to sRGB", _HDR.get(transfer, codes))


def _png_codes(content: bytes) -> ColorSpace | None:
    """Return the color space declared by the cICP chunk of a PNG, or None if there is no such chunk."""
    found = _CICP.search(content, 0, content.find(b"IDAT")) if content.startswith(_PNG) else None
    if found is None:
        return None
    primaries, transfer, matrix, full_range = found[1]
    if matrix or full_range != 1:
        raise _unsupported("full-range RGB in a PNG", "a cICP chunk of YCbCr or narrow range")
    return _coded(primaries, transfer)


def _png_gamma(image: Image.Image) -> ColorSpace | None:
    """Return the color space declared by the sRGB, gAMA and cHRM chunks of a PNG, or None."""
    gamma, points = image.info.get("gamma"), image.info.get("chromaticity")
    if "srgb" in image.info:
        return SRGB
    if points is not None and len(points) != 8:
        points = None
    if not gamma and points is None:
        return None
    # 0.45455 denotes the sRGB curve because encoders write this value together with an sRGB chunk.
    exponent = None if not gamma or abs(gamma - 0.45455) < 0.0005 else 1 / gamma
    return ColorSpace(_BT709 if points is None else (*points[2:], *points[:2]), exponent)


def _avif_codes(content: bytes) -> ColorSpace | None:
    """Return the color space declared by the first nclx property of an AVIF, or None."""
    found = _NCLX.search(content) if content[4:8] == b"ftyp" else None
    return None if found is None else _coded(*struct.unpack(">HH", found[1]))


def _profile(image: Image.Image, content: bytes) -> bytes | None:
    """Return the ICC profile of an image, or None. Pillow does not read profiles from V4 and V5 headers of BMP."""
    if not content.startswith(b"BM") or len(content) < 138 or int.from_bytes(content[14:18], "little") < 108:
        return image.info.get("icc_profile")
    space_type, endpoints = content[70:74][::-1], content[74:122]
    if space_type == b"LINK" or (space_type == bytes(4) and any(endpoints)):
        found = "a profile in another file" if space_type == b"LINK" else "custom endpoints"
        raise _unsupported("an sRGB BMP", found)
    start, size = struct.unpack_from("<II", content, 126)
    return content[14 + start : 14 + start + size] if space_type == b"MBED" else None


def _exif_space(image: Image.Image) -> ColorSpace | None:
    """Return the color space declared by EXIF tags or by the TIFF tags that EXIF uses, or None."""
    try:
        exif = image.getexif()
        details = exif.get_ifd(ExifTags.IFD.Exif)
        interop = exif.get_ifd(ExifTags.IFD.Interop) if ExifTags.IFD.Interop in details else {}
        number, index = (
            details.get(ExifTags.Base.ColorSpace),
            str(interop.get(ExifTags.Interop.InteropIndex, "")),
        )
        own_curve = exif.get(ExifTags.Base.TransferFunction) is not None
        points = _numbers(exif.get(ExifTags.Base.PrimaryChromaticities), 6)
        points += _numbers(exif.get(ExifTags.Base.WhitePoint), 2)
        gamma = _numbers(details.get(ExifTags.Base.Gamma), 1)
    except Exception:  # Pillow raises exceptions of many types for damaged EXIF data
        return None
    if number == 1:
        return SRGB
    if number == 2 or index.startswith("R03"):  # Adobe RGB in DCF 2.0
        return ADOBE_RGB
    if own_curve:
        raise _unsupported("colors that can be converted to sRGB", "a TIFF with a custom transfer function")
    if len(points) == 8 or gamma:
        return ColorSpace(points if len(points) == 8 else _BT709, gamma[0] if gamma else None)
    return None


def _numbers(value: object, count: int) -> tuple[float, ...]:
    """Return the value of a tag as a tuple, or an empty tuple if it is not ``count`` finite positive numbers."""
    numbers = () if value is None else tuple(np.asarray(value, dtype=np.float64).ravel().tolist())
    fits = len(numbers) == count and all(math.isfinite(number) and number > 0 for number in numbers)
    return numbers if fits else ()
