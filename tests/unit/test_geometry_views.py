"""Encoding and decoding of depth and normal images."""

import io

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lrm_pl.data.geometry_views import (
    decode_depth,
    decode_normals,
    encode_depth,
    encode_normals,
    read_pixels,
    write_pixels,
)
from lrm_pl.data.schema import SampleError, decode_image

DEPTH, NORMAL = "depth_000.png", "normal_000.png"


def test_encoded_depth_equals_hand_computed_values():
    # 2 / 8 * 65535 = 16383.75; 0.001 / 8 * 65535 = 8.19
    encoded = encode_depth(np.array([[0, 8.0, 2.0], [0.001, 4.00004, 0]], dtype=np.float32))
    assert read_pixels("a", DEPTH, encoded).tolist() == [[0, 65535, 16384], [8, 32768, 0]]
    with Image.open(io.BytesIO(encoded)) as image:
        assert (image.mode, image.size) == ("I;16", (3, 2))
    depth = decode_depth("a", DEPTH, encoded)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, [[0, 8, 16384 * 8 / 65535], [64 / 65535, 4.00006, 0]], rtol=1e-6)


def test_depth_is_exact_to_half_a_step_and_encoding_is_idempotent():
    depth = np.random.default_rng(0).uniform(0.001, 8, (40, 50))
    encoded = encode_depth(depth)
    again = decode_depth("a", DEPTH, encoded)
    assert np.abs(again - depth).max() < 0.5 * 8 / 65535 + 1e-6
    assert encode_depth(again) == encoded


def test_encoded_normals_equal_hand_computed_values():
    # (0.28 + 1) / 2 * 255 = 163.2, (-0.96 + 1) / 2 * 255 = 5.1; 0 is no normal, and black
    encoded = encode_normals(np.array([[(0, 0, 0), (0.28, -0.96, 0)], [(1, 0, 0), (0, 0, -1)]]))
    pixels = [[[0, 0, 0], [163, 5, 128]], [[255, 128, 128], [128, 128, 0]]]
    assert read_pixels("a", NORMAL, encoded).tolist() == pixels
    normals = decode_normals("a", NORMAL, encoded)
    assert normals.dtype == np.float32
    # 163 is 0.278431, 5 is -0.960784, 128 is 0.003922: a vector of length 1.000323
    np.testing.assert_allclose(normals[0], [(0, 0, 0), (0.278341, -0.960474, 0.003920)], atol=1e-6)


def test_normals_are_exact_to_half_a_degree():
    normals = np.random.default_rng(0).normal(size=(40, 50, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    again = decode_normals("a", NORMAL, encode_normals(normals))
    np.testing.assert_allclose(np.linalg.norm(again, axis=-1), 1, atol=1e-6)
    assert np.degrees(np.arccos((again * normals).sum(-1).clip(-1, 1))).max() < 0.5


@pytest.mark.parametrize("depth", [-1.0, 0.0001, 8.1, np.inf, np.nan])
def test_depth_out_of_range_raises_an_error(depth):
    with pytest.raises(SampleError, match=r"expected depths that are 0 or between 0\.001 and 8\.0"):
        encode_depth(np.array([[1.0, depth]]))


@pytest.mark.parametrize("length", [0.9, 1.1, np.nan])
def test_normals_of_a_length_other_than_1_raise_an_error(length):
    with pytest.raises(SampleError, match="expected normals of length 0 or 1"):
        encode_normals(np.array([[(0, 0, 1), (0, 0, length)]]))


def png(mode, size=(8, 8), **options):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def text_bomb(mode):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 3_000_000, zip=True)  # three kilobytes
    return png(mode, pnginfo=info)


@pytest.mark.parametrize(
    ("name", "encoded", "message"),
    [
        (DEPTH, png("L"), r"a PNG of mode I;16 .* in depth_000\.png, but found mode L"),
        (DEPTH, png("RGB"), "found mode RGB"),
        (DEPTH, png("I;16", (4097, 1)), r"at most 4096 pixels per side in .*, but found .*\(4097, 1\)"),
        (DEPTH, png("I;16")[:40], "found 40 bytes"),
        (DEPTH, b"GIF89a", "found 6 bytes"),
        (DEPTH, text_bomb("I;16"), "too large"),
        (
            DEPTH,
            write_pixels(np.full((2, 2), 7, np.uint16)),
            r"depths that are 0 or between 0\.001 and 8\.0 in depth_000\.png",
        ),
        (NORMAL, png("RGBA"), r"a PNG of mode RGB .* in normal_000\.png, but found mode RGBA"),
        (NORMAL, png("I;16"), "found mode I;16"),
        (NORMAL, png("RGB", (1, 4097)), r"\(1, 4097\)"),
        (
            NORMAL,
            write_pixels(np.full((2, 2, 3), 128, np.uint8)),
            r"length 0 or 1 in normal_000\.png.* 0\.00679",
        ),
        (
            NORMAL,
            write_pixels(np.full((2, 2, 3), 255, np.uint8)),
            r"length 0 or 1 in normal_000\.png.* 1\.73",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{len(value)}_bytes",
)
def test_invalid_images_raise_an_error_with_the_member_name(name, encoded, message):
    decode = decode_depth if name == DEPTH else decode_normals
    with pytest.raises(SampleError, match=rf"sample 'chair': expected .*{message}"):
        decode("chair", name, encoded)


def test_a_png_with_a_text_bomb_raises_an_error():
    with pytest.raises(SampleError, match="sample 'chair': expected a PNG or WebP view"):
        decode_image("chair", text_bomb("RGBA"))
