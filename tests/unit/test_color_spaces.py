"""Conversion of declared color spaces to sRGB, compared with values computed by hand."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from lrm_pl.images import ImageError, NotAnImageError, open_image, to_rgb8
from tests.builders import encoded, wide_profile

#: Matrices from linear RGB of a color space to linear sRGB (brucelindbloom.com has the same values).
P3 = [[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]]
ADOBE = [[1.3984, -0.3984, 0], [0, 1, 0], [0, -0.0429, 1.0429]]
BT2020 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]

COLOR = (210, 90, 50)
P3_CODES, ADOBE_XY = (12, 13), (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def by_hand(color, matrix, gamma=None):
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if gamma is None else (c / 255) ** gamma for c in color]
    light = [sum(m * x for m, x in zip(row, linear, strict=True)) for row in matrix]
    return [255 * (1.055 * min(max(x, 0.0031), 1) ** (1 / 2.4) - 0.055) for x in light]


def plain(color=COLOR, mode="RGB"):
    return Image.new("RGB", (16, 16), color).convert(mode)


def with_chunks(content, **chunks):
    """Insert chunks before the first IDAT chunk of a PNG."""
    at = content.index(b"IDAT") - 4
    for kind, data in chunks.items():
        name = kind.encode()
        chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        content, at = content[:at] + chunk + content[at:], at + len(chunk)
    return content


def gray_png(bits, rows, transparent, color_type=0):
    """A PNG with samples of any bit depth and a transparent value, which Pillow cannot write."""
    size = struct.pack(">II", len(rows[0]) * 8 // bits // (3 if color_type else 1), len(rows))
    header = size + struct.pack(">BBBBB", bits, color_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", data), (b"IEND", b"")):
        png += (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )
    return png


def gray_profile():
    """Return a linear gray ICC profile."""
    d50 = struct.pack(">3i", 63190, 65536, 54061)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"g\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + d50,
        b"kTRC": b"curv" + bytes(8),
        b"cprt": b"text" + bytes(4) + b"-\0\0\0",
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    head = bytes(8) + struct.pack(">I", 0x02400000) + b"mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28) + d50
    profile = head + bytes(128 - len(head)) + table + body
    return struct.pack(">I", len(profile)) + profile[4:]


def avif(primaries, transfer, **options):
    content = encoded(plain(), "AVIF", quality=100, subsampling="4:4:4", **options)
    at = content.index(b"nclx") + 4
    return content[:at] + struct.pack(">HH", primaries, transfer) + content[at + 4 :]


def exif(color_space, interop=None, primaries=None):
    tags = Image.Exif()
    tags[0x010F] = "maker"  # PIL writes no EXIF of subfolders alone
    details = tags.get_ifd(0x8769)
    details[0xA001] = color_space
    if interop:
        details[0xA005] = {1: interop}
    if primaries:
        tags[0x013E], tags[0x013F] = (0.3127, 0.3290), primaries
    return tags


def jpeg(tags):
    return encoded(plain(), "JPEG", quality=100, subsampling=0, exif=tags)


def bmp(kind, endpoints=bytes(48), profile=b""):
    """A 32-bit BMP with a V5 header."""
    pixels = bytes((*COLOR[::-1], 255)) * 256
    head = struct.pack("<IiiHHIIiiII", 124, 16, -16, 1, 32, 3, len(pixels), 0, 0, 0, 0)
    head += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + kind[::-1] + endpoints
    head += struct.pack("<4I", 4, 124 + len(pixels), len(profile), 0)
    size = 14 + len(head) + len(pixels) + len(profile)
    return b"BM" + struct.pack("<IHHI", size, 0, 0, 138) + head + pixels + profile


def tiff(image=None, **tags):
    numbers = {"white": 318, "primaries": 319, "curve": 301}
    return encoded(image or plain(), "TIFF", tiffinfo={numbers[name]: value for name, value in tags.items()})


CHRM_ADOBE = struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (with_chunks(encoded(plain()), cICP=bytes((12, 13, 0, 1))), by_hand(COLOR, P3)),
        (with_chunks(encoded(plain()), cICP=bytes((9, 1, 0, 1))), by_hand(COLOR, BT2020)),
        (with_chunks(encoded(plain()), cICP=bytes((9, 8, 0, 1))), by_hand(COLOR, BT2020, 1)),
        (
            with_chunks(encoded(plain(), icc_profile=wide_profile()), cICP=bytes((1, 13, 0, 1))),
            COLOR,
        ),
        (with_chunks(encoded(plain()), gAMA=struct.pack(">I", 100_000)), by_hand(COLOR, np.eye(3), 1)),
        (
            with_chunks(encoded(plain()), gAMA=struct.pack(">I", 45470), cHRM=CHRM_ADOBE),
            by_hand(COLOR, ADOBE),
        ),
        (
            with_chunks(encoded(plain()), gAMA=struct.pack(">I", 100_000), sRGB=b"\0"),
            COLOR,
        ),
        (encoded(plain(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()), COLOR),
        (avif(*P3_CODES), by_hand(COLOR, P3)),
        (avif(1, 1), COLOR),
        (avif(2, 2), COLOR),
        (jpeg(exif(65535, "R03")), by_hand(COLOR, ADOBE, 563 / 256)),
        (jpeg(exif(2)), by_hand(COLOR, ADOBE, 563 / 256)),
        (encoded(plain(), exif=exif(2)), by_hand(COLOR, ADOBE, 563 / 256)),
        (encoded(plain(), "WEBP", lossless=True, exif=exif(2)), by_hand(COLOR, ADOBE, 563 / 256)),
        (encoded(plain(), "TIFF", exif=exif(2).tobytes()), by_hand(COLOR, ADOBE, 563 / 256)),
        (jpeg(exif(65535, primaries=ADOBE_XY)), by_hand(COLOR, ADOBE)),
        (jpeg(exif(1, "R98", ADOBE_XY)), COLOR),
        (jpeg(exif(65535)), COLOR),
        (tiff(white=(0.3127, 0.3290), primaries=ADOBE_XY), by_hand(COLOR, ADOBE)),
        (bmp(b"sRGB"), COLOR),
        (bmp(bytes(4)), COLOR),
        (bmp(b"MBED", profile=wide_profile()), by_hand(COLOR, P3)),
    ],
    ids=[
        "png cICP P3", "png cICP BT.2020", "png cICP linear", "png cICP before a profile", "png gAMA 1",
        "png cHRM", "png sRGB before gAMA", "sRGB profile", "avif nclx P3", "avif nclx BT.709",
        "avif nclx unspecified", "exif R03", "exif Adobe RGB", "exif of a png", "exif of a webp", "exif of a tiff",
        "exif primaries", "exif sRGB", "exif uncalibrated", "tiff primaries", "bmp sRGB",
        "bmp without endpoints", "bmp embedded profile",
    ],
)  # fmt: skip
def test_declared_color_spaces_are_converted_to_srgb(content, expected):
    found = np.asarray(open_image(content))[8, 8, :3]
    assert np.abs(found - np.array(expected)).max() < 2.5, (found, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            with_chunks(encoded(plain()), cICP=bytes((9, 16, 0, 1))),
            "found PQ, which is HDR. Export the image as sRGB",
        ),
        (with_chunks(encoded(plain()), cICP=bytes((9, 18, 0, 1))), "found HLG, which is HDR"),
        (with_chunks(encoded(plain()), cICP=bytes((1, 13, 0, 0))), "of YCbCr or narrow range"),
        (avif(9, 16), "found PQ, which is HDR"),
        (avif(10, 13), "found color primaries 10 and transfer characteristics 13 of H.273"),
        (bmp(b"LINK"), "a profile in another file"),
        (bmp(bytes(4), endpoints=b"\1" * 48), "custom endpoints"),
        (tiff(curve=tuple(range(256))), "a custom transfer function"),
    ],
    ids=[
        "png PQ",
        "png HLG",
        "png narrow",
        "avif PQ",
        "avif primaries",
        "bmp link",
        "bmp endpoints",
        "tiff curve",
    ],
)
def test_unsupported_color_spaces_raise_an_error(content, message):
    with pytest.raises(ImageError, match=f"a photo: expected .*{message}"):
        open_image(content, "a photo")


def test_a_profile_of_an_avif_takes_precedence_over_codes_and_alpha_is_not_converted():
    image = plain(mode="RGBA")
    image.putalpha(128)
    content = bytearray(encoded(image, "AVIF", quality=100, subsampling="4:4:4"))
    at = content.index(b"nclx") + 4
    content[at : at + 4] = struct.pack(">HH", *P3_CODES)
    found = np.asarray(open_image(bytes(content)))[8, 8]
    assert np.abs(found - np.array([*by_hand(COLOR, P3), 128])).max() < 2.5
    both = avif(9, 13, icc_profile=wide_profile())
    assert np.abs(np.asarray(open_image(both))[8, 8] - np.array(by_hand(COLOR, P3))).max() < 2.5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA"])
def test_a_gray_profile_is_applied_only_to_gray_images(mode):
    image = plain(mode=mode)
    found = np.asarray(open_image(encoded(image, icc_profile=gray_profile())).convert("RGB"))[0, 0]
    stored = image.convert("RGB").getpixel((0, 0))
    expected = by_hand(stored, np.eye(3), 1) if mode.startswith("L") else stored
    assert np.abs(found - np.array(expected)).max() < 1.5


def test_declared_srgb_does_not_change_colors():
    every = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    chunks = {
        "gAMA": struct.pack(">I", 45455),
        "cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    }
    for content in (
        encoded(every, icc_profile=profile),
        with_chunks(encoded(every), **chunks),
        with_chunks(encoded(every), cICP=bytes((1, 13, 0, 1))),
    ):
        np.testing.assert_array_equal(np.asarray(open_image(content)), np.asarray(every))


def test_to_rgb8_converts_colors_of_pillow_images_and_keeps_alpha():
    image = plain(mode="RGBA")
    image.putpixel((0, 0), (*COLOR, 77))
    content = with_chunks(encoded(image), gAMA=struct.pack(">I", 100_000))
    found = to_rgb8(Image.open(io.BytesIO(content)))
    assert np.abs(np.array(found.getpixel((0, 0))) - [*by_hand(COLOR, np.eye(3), 1), 77]).max() < 1.5
    assert not to_rgb8(found).info


@pytest.mark.parametrize("damage", [b"", bytes(32), b"\xff" * 32])
def test_degenerate_primaries_are_ignored(damage):
    content = with_chunks(encoded(plain()), cHRM=damage)
    assert open_image(content).getpixel((0, 0)) == COLOR


@pytest.mark.parametrize(("bits", "row", "value"), [(2, 0b00011011, 1), (4, 0x1F, 1), (8, 0x01, 1)])
def test_a_transparent_gray_value_is_applied_at_every_bit_depth(bits, row, value):
    found = np.asarray(open_image(gray_png(bits, [bytes([row])], struct.pack(">H", value))))
    samples = [(row >> shift) & ((1 << bits) - 1) for shift in range(8 - bits, -1, -bits)]
    assert found[0, :, 0].tolist() == [sample * 255 // ((1 << bits) - 1) for sample in samples]
    assert found[0, :, 3].tolist() == [0 if sample == value else 255 for sample in samples]


def test_16_bit_gray_is_divided_by_65535_and_keeps_the_transparent_value():
    row = struct.pack(">4H", 0, 200, 32896, 65535)
    found = np.asarray(open_image(gray_png(16, [row], struct.pack(">H", 200))))
    assert found[0].tolist() == [[0, 0, 0, 255], [1, 1, 1, 0], [128, 128, 128, 255], [255, 255, 255, 255]]
    dark = np.asarray(open_image(encoded(Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)))))
    assert dark.max() == 1
    colors = gray_png(16, [struct.pack(">6H", 0, 0, 0, 1, 0, 0)], bytes(6), color_type=2)
    with pytest.raises(
        ImageError, match=r"8 bits per channel in a PNG with a transparent color \(tRNS\), but found 16"
    ):
        open_image(colors)


def raw_tiff(samples, bits, sample_format=1, photometric=1, channels=1):
    """An uncompressed TIFF of 4 x 1 pixels, little endian."""
    tags = {
        256: (4, 4), 257: (4, 1), 258: (3, bits), 259: (3, 1), 262: (3, photometric), 273: (4, 200),
        277: (3, channels), 278: (4, 1), 279: (4, len(samples)), 339: (3, sample_format),
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head + bytes(200 - len(head)) + samples


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("chunk", [{"gAMA": struct.pack(">I", 100_000)}, {"cICP": bytes((1, 8, 0, 1))}])
def test_dark_colors_of_linear_16_bit_images_keep_their_precision(channels, chunk):
    stored = np.tile(np.arange(0, 4096, 64, dtype=np.uint16)[None, :, None], (4, 1, channels))
    stored[..., 3:] = 65535
    _, png = cv2.imencode(".png", stored)
    found = np.asarray(open_image(with_chunks(png.tobytes(), **chunk)))
    light = stored[0, :, 0] / 65535
    expected = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255
    for channel in range(3):
        assert np.abs(found[0, :, channel] - expected).max() <= 0.51
    assert found.shape[2] == max(3, channels)


def test_white_level_of_a_tiff_depends_on_bits_and_photometric_interpretation():
    twelve = bytes((0x00, 0x08, 0x00, 0xFF, 0xFF, 0xFF))  # 0, 2048, 4095, 4095
    assert np.asarray(open_image(raw_tiff(twelve, 12)))[0, :, 0].tolist() == [0, 128, 255, 255]
    sixteen = struct.pack("<4H", 0, 200, 32896, 65535)
    assert np.asarray(open_image(raw_tiff(sixteen, 16)))[0, :, 0].tolist() == [0, 1, 128, 255]
    inverted = raw_tiff(sixteen, 16, photometric=0)
    assert np.asarray(open_image(inverted))[0, :, 0].tolist() == [255, 254, 127, 0]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (
            raw_tiff(struct.pack("<4f", 0.3, 0.5, 0.8, 1), 32, 3),
            ImageError,
            "8 or 16 bits per channel, but found floats",
        ),
        (raw_tiff(struct.pack("<4I", 0, 1, 2, 3), 32), ImageError, "found signed or 32-bit integers"),
        (raw_tiff(struct.pack("<4h", 0, 1, 2, 3), 16, 2), ImageError, "found signed or 32-bit integers"),
        (raw_tiff(bytes(4), 8, 2), ImageError, "found signed or 32-bit integers"),
        (
            raw_tiff(bytes(8), 16, 3),
            NotAnImageError,
            "an image .*, but found a TIFF of an unknown format. Convert the image to PNG with 8 bits",
        ),
        (encoded(plain(mode="YCbCr"), "TIFF"), ImageError, "RGB in a TIFF .*, but found YCbCr"),
    ],
    ids=["floats", "32 bits", "signed 16", "signed 8", "half floats", "YCbCr"],
)
def test_unsupported_tiff_formats_raise_an_error_with_the_format(content, error, message):
    with pytest.raises(error, match=f"a.tif: expected .*{message}"):
        open_image(content, "a.tif")


def test_a_tiff_with_jpeg_compression_is_decoded():
    content = encoded(plain(), "TIFF", compression="jpeg", quality=100)
    assert np.abs(np.asarray(open_image(content))[8, 8].astype(int) - COLOR).max() < 4


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pillow_images_with_unknown_white_level_raise_an_error(mode):
    with pytest.raises(ImageError, match="whose white level is unknown"):
        to_rgb8(Image.new(mode, (4, 4)))


@pytest.mark.parametrize(
    ("mode", "expected"), [("La", "RGBA"), ("PA", "RGBA"), ("LAB", "RGB"), ("HSV", "RGB"), ("YCbCr", "RGB")]
)
def test_other_pillow_modes_are_converted_to_rgb_or_rgba(mode, expected):
    assert to_rgb8(plain(mode="LA").convert(mode) if mode == "La" else plain(mode=mode)).mode == expected


def test_a_palette_with_alpha_keeps_alpha():
    image = Image.new("RGBA", (2, 1), (9, 8, 7, 0))
    image.putpixel((1, 0), (1, 2, 3, 255))
    found = to_rgb8(image.quantize(4, method=Image.Quantize.FASTOCTREE))
    assert [found.getpixel((x, 0))[3] for x in range(2)] == [0, 255]
