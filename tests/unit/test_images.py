"""Opening of untrusted images, and framing of objects."""

import contextlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from lrm_pl.images import (
    ImageError,
    frame_object,
    has_background,
    has_object,
    is_uniform,
    object_box,
    open_image,
    remove_background,
    to_rgb8,
)
from tests.builders import encoded, png, wide_profile

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an image .*found 0 bytes of an unknown format"),
        (b"hello " * 100, "expected an image .*found 600 bytes of an unknown format. Convert the image"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
            ".*of an unknown format",
        ),  # PIL would start Ghostscript
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", ".*of an unknown format"),
        (encoded(RGB, "GIF"), ".*of an unknown format"),
        (encoded(RGB)[:200], "expected an intact image, but found a damaged image"),
        (encoded(RGB, "JPEG")[:300], "expected an intact image, but found a damaged image"),
        (encoded(RGB, "WEBP")[:300], "expected an (intact )?image"),
        (png(30_000, 30_000), "expected an image of at most 67 megapixels, but found "),
        (png(20, 20, zlib.compress(b"")), "expected an intact image, but found a damaged image"),
    ],
    ids=["empty", "text", "postscript", "svg", "gif", "png cut", "jpeg cut", "webp cut", "bomb", "no pixels"],
)
def test_invalid_images_raise_an_error_with_the_reason(content, message):
    with pytest.raises(ImageError, match=f"a.bin: {message}"):
        open_image(content, "a.bin")


def test_images_above_the_given_limits_raise_an_error(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(RGB))
    assert open_image(path).size == (30, 20)
    with pytest.raises(ImageError, match=r"a\.png: expected a file of at most 100 bytes"):
        open_image(path, max_bytes=100)
    with pytest.raises(ImageError, match="expected an image of at most 0 megapixels, but found 30 x 20"):
        open_image(path, max_pixels=599)
    with pytest.raises(ImageError, match=r"found no file. Correct the path"):
        open_image(tmp_path / "b.png")


@pytest.mark.parametrize(
    ("image", "mode"),
    [
        (RGB.convert("L"), "RGB"),
        (RGB.convert("1"), "RGB"),
        (RGB.convert("P"), "RGB"),
        (RGB.convert("LA"), "RGBA"),
        (RGB.convert("RGBA"), "RGBA"),
    ],
    ids=["gray", "bits", "palette", "gray with alpha", "alpha"],
)
def test_png_modes_are_converted_to_rgb_or_rgba_with_the_same_colors(image, mode):
    found = open_image(encoded(image))
    assert found.mode == mode
    np.testing.assert_array_equal(np.asarray(found), np.asarray(image.convert(mode)))


def test_16_bit_images_become_8_bit_and_transparent_colors_become_alpha():
    deep = Image.fromarray((np.arange(600).reshape(20, 30) * 109).astype(np.uint16))
    found = np.asarray(open_image(encoded(deep)))
    assert np.abs(found[..., 0] - np.arange(600).reshape(20, 30) * 109 / 257).max() < 1.01
    clear = open_image(encoded(RGB.convert("P"), transparency=0))
    assert clear.mode == "RGBA"


def test_the_exif_orientation_of_a_jpeg_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = RGB.resize((3, 2)).resize((30, 20), Image.Resampling.BICUBIC)
    found = open_image(encoded(smooth, "JPEG", exif=exif, quality=95))
    assert found.size == (20, 30)
    turned = np.asarray(smooth.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(np.asarray(found) - turned).mean() < 3


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_exif_orientation_is_applied_exactly_once(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = open_image(encoded(RGB.convert(mode), exif=exif))
    assert found.size == ((30, 20) if orientation < 5 else (20, 30))
    again = to_rgb8(to_rgb8(found))
    assert not found.info
    for other in (again, ImageOps.exif_transpose(found)):  # rembg also applies the orientation
        np.testing.assert_array_equal(np.asarray(other), np.asarray(found))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colors_are_converted_from_the_profile_to_srgb(mode):
    color = (210, 90, 50)
    image = Image.new("RGB", (4, 4), color).convert(mode)
    found = open_image(encoded(image, icc_profile=wide_profile()))
    # Display P3 -> XYZ -> sRGB by hand, in linear light.
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    matrix = [[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]]
    light = [sum(m * x for m, x in zip(row, linear, strict=True)) for row in matrix]
    expected = [255 * (1.055 * max(x, 0) ** (1 / 2.4) - 0.055) for x in light]
    assert np.abs(np.asarray(found)[0, 0, :3] - expected).max() < 2
    assert found.mode == mode


@pytest.mark.parametrize("profile", [b"no profile", wide_profile()[:200]])
def test_a_damaged_profile_is_ignored(profile):
    np.testing.assert_array_equal(np.asarray(open_image(encoded(RGB, icc_profile=profile))), np.asarray(RGB))


@pytest.mark.parametrize(
    ("kind", "options"), [("TIFF", {}), ("AVIF", {"quality": 100}), ("JPEG", {"quality": 95})]
)
def test_tiff_avif_and_jpeg_are_decoded(kind, options):
    smooth = RGB.resize((3, 2)).resize((32, 20), Image.Resampling.BICUBIC)
    found = open_image(encoded(smooth, kind, **options))
    assert np.abs(np.asarray(found).astype(int) - np.asarray(smooth)).mean() < 3


def test_an_image_has_a_background_unless_most_of_the_border_is_transparent():
    assert has_background(RGB)
    assert has_background(RGB.convert("RGBA"))
    screenshot = RGB.convert("RGBA")
    for corner in ((0, 0), (29, 0), (0, 19), (29, 19)):
        screenshot.putpixel(corner, (1, 2, 3, 0))
    assert has_background(screenshot)
    cutout = Image.new("RGBA", (30, 20))
    cutout.paste((9, 9, 9, 255), (10, 5, 25, 20))  # touches the lower border
    assert not has_background(cutout)


def test_removing_the_background_keeps_transparent_pixels_and_hides_their_colors():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 255))
    image.putpixel((0, 0), (0, 255, 0, 0))
    seen = []

    def remover(opened):
        seen.append(opened)
        removed = opened.convert("RGBA")
        removed.putpixel((1, 1), (0, 0, 0, 0))
        return removed

    alpha = np.asarray(remove_background(image, remover).getchannel("A"))
    assert seen[0].getpixel((0, 0)) == (255, 255, 255)
    assert alpha[0, 0] == alpha[1, 1] == 0
    assert alpha.sum() == 14 * 255


def rectangle(top, left, height, width, size=(60, 100)):
    rgba = np.zeros((*size, 4), dtype=np.uint8)
    rgba[..., :3] = (0, 255, 0)  # the color of transparent pixels must not bleed in
    rgba[top : top + height, left : left + width] = (200, 40, 10, 255)
    return Image.fromarray(rgba)


@pytest.mark.parametrize("place", [(20, 30, 12, 24), (0, 0, 12, 24), (48, 76, 12, 24), (0, 0, 60, 100)])
@pytest.mark.parametrize("side", [64, 256])
def test_frame_object_centers_the_object_with_the_given_size(place, side):
    found = np.asarray(frame_object(rectangle(*place), 0.75, side))
    assert found.shape == (side, side, 4)
    left, top, right, bottom = object_box(found[..., 3] / 255)
    wide = side * 0.75
    high = wide * place[2] / place[3]
    assert right - left == pytest.approx(wide, abs=2)
    assert bottom - top == pytest.approx(high, abs=2)
    assert (left + right) / 2 == pytest.approx(side / 2, abs=1)
    assert (top + bottom) / 2 == pytest.approx(side / 2, abs=1)
    solid = found[..., 3] > 200
    assert np.abs(found[solid][:, :3].astype(int) - (200, 40, 10)).max() <= 12
    assert (found[found[..., 3] > 8][:, 1] < 90).all()


def test_a_few_opaque_pixels_are_not_an_object():
    alpha = np.zeros((100, 100), dtype=np.uint8)
    alpha[:3, :3] = 255
    image = Image.new("RGBA", (100, 100))
    for opaque, expected in ((9, False), (10, True)):
        alpha[50, 0] = 255 * (opaque == 10)
        image.putalpha(Image.fromarray(alpha))
        assert has_object(image) is expected


def test_frame_object_rejects_empty_images_and_accepts_faint_objects():
    with pytest.raises(ImageError, match=r"alpha 0 everywhere. Check the alpha channel"):
        frame_object(Image.new("RGBA", (8, 8)), 0.8, 32)
    faint = np.zeros((20, 20, 4), dtype=np.uint8)
    faint[5:15, 5:15, 3] = 60
    assert object_box(faint[..., 3] / 255) == (5, 5, 15, 15)
    assert np.asarray(frame_object(Image.fromarray(faint), 0.5, 32))[..., 3].max() == 60


def test_framing_a_long_thin_object_uses_bounded_memory():
    line = np.zeros((2, 400_000, 4), dtype=np.uint8)
    line[:, 1000:-1000] = 255
    tracemalloc.start()
    found = np.asarray(frame_object(Image.fromarray(line), 0.75, 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * line.nbytes
    assert object_box(found[..., 3] / 255)[::2] == (32, 225)


@pytest.mark.parametrize("chunk", [b"gAMA", b"cHRM", b"tRNS", b"iCCP"])
def test_a_damaged_chunk_raises_an_image_error_or_is_ignored(chunk):
    content = encoded(RGB)
    end = content.index(b"IEND") - 4
    damaged = struct.pack(">I", 0) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with contextlib.suppress(ImageError):
        assert open_image(content[:end] + damaged + content[end:]).size == (30, 20)


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (1, 7)])
def test_frame_object_rejects_tiny_objects(size):
    rgba = Image.new("RGBA", (64, 64))
    rgba.paste((200, 100, 50, 255), (20, 20, 20 + size[0], 20 + size[1]))
    with pytest.raises(ImageError, match=f"an object of at least 8 pixels, but found {size[0]} x {size[1]}"):
        frame_object(rgba, 0.7, 64)
    rgba.paste((200, 100, 50, 255), (20, 20, 21, 28))  # tall enough
    assert frame_object(rgba, 0.7, 64).size == (64, 64)


def test_is_uniform_detects_images_of_one_color():
    noise = np.random.default_rng(0).integers(0, 9, (40, 40, 3), dtype=np.uint8)
    for value in (0, 100, 247):
        assert is_uniform(Image.fromarray(noise + np.uint8(value)))
    noise[0, 0] = 200
    assert not is_uniform(Image.fromarray(noise))
