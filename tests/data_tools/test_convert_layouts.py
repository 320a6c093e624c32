"""Conversion of the layouts of other projects to shards."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_tools.layouts.files import to_rgba_view
from data_tools.quality.validate import validate
from lrm_pl.data.manifest import read_manifest
from lrm_pl.data.schema import decode_image
from lrm_pl.errors import InputError
from tests.data_tools.layout_folders import (
    ONE_LAYOUT,
    VIEWS,
    WRITERS,
    an_image,
    converted,
    ellipsoid,
    png_chunk,
    reasons,
)


def test_conversion_preserves_cameras_and_images(layout, tmp_path):
    went_in = {key: ellipsoid(key) for key in ("a", "b", "c")}
    for key, sample in went_in.items():
        WRITERS[layout](tmp_path / "in" / "000-023" / key, sample)
    came_out = converted(layout, tmp_path / "in", tmp_path / "out", held_out=1, shard_size=1)
    assert set(came_out) == {"000-023_a", "000-023_b", "000-023_c"}
    for key, sample in went_in.items():
        found = came_out[f"000-023_{key}"]
        np.testing.assert_allclose(found.c2w, sample.c2w, atol=2e-6)
        np.testing.assert_allclose(found.fxfycxcy, sample.fxfycxcy, atol=1e-6)
        assert found.views == sample.views
        assert (found.info.name, found.info.license, found.info.source) == (key, "unknown", f"000-023/{key}")
        assert found.info.renderer == f"converted from {layout}"
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.views, manifest.failures, manifest.render["normalize"]) == (VIEWS, 0, "cube")
    assert [shard.split for shard in manifest.shards] == ["train", "train", "val"]
    assert validate(tmp_path / "out") == 0
    assert (tmp_path / "out" / "contact_sheet.png").is_file()
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]


@ONE_LAYOUT
def test_subfolders_of_an_object_are_not_searched(layout, tmp_path):
    for folder in (tmp_path / "in" / "a", tmp_path / "in" / "a" / "before"):
        WRITERS[layout](folder, ellipsoid("a"))
    assert set(converted(layout, tmp_path / "in", tmp_path / "out")) == {"a"}


def test_an_object_without_its_first_view_is_reported(layout, tmp_path):
    for key in ("a", "b", "c"):
        WRITERS[layout](tmp_path / "in" / key, ellipsoid(key))
    for path in (tmp_path / "in" / "b").rglob("000.*"):
        path.unlink()
    assert set(converted(layout, tmp_path / "in", tmp_path / "out")) == {"a", "c"}
    assert (
        f"expected {VIEWS} views of 32 x 32 pixels, as for most objects, but found {VIEWS - 1}"
        in reasons(tmp_path / "out")["b"]
    )


@ONE_LAYOUT
def test_resizing_changes_images_and_preserves_cameras(layout, tmp_path):
    WRITERS[layout](tmp_path / "in" / "a", ellipsoid("a"))
    found = converted(layout, tmp_path / "in", tmp_path / "out", resolution=16)["a"]
    assert {decode_image("a", view).shape for view in found.views} == {(16, 16, 4)}
    np.testing.assert_allclose(found.c2w, ellipsoid("a").c2w, atol=2e-6)
    assert validate(tmp_path / "out") == 0


@ONE_LAYOUT
def test_linked_folders_are_found_once_and_dangling_links_are_reported(layout, tmp_path):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    WRITERS[layout](root / "a", ellipsoid("a"))
    for key in ("b", "c"):
        WRITERS[layout](elsewhere / "group" / key, ellipsoid(key))
    (root / "0-again").symlink_to(root / "a")
    (root / "circle").symlink_to(root)
    (root / "b").symlink_to(elsewhere / "group" / "b")
    (root / "group").symlink_to(elsewhere / "group")
    (root / "lost").symlink_to(elsewhere / "lost")
    assert set(converted(layout, root, tmp_path / "out")) == {"a", "b", "group_c"}
    assert set(reasons(tmp_path / "out")) == {"lost"}
    assert "expected" in reasons(tmp_path / "out")["lost"]


def as_palette(rgba):
    return Image.fromarray(rgba).quantize(256, method=Image.Quantize.FASTOCTREE)


def as_gray(rgba):
    return Image.fromarray(rgba).convert("LA")


def as_key_color(rgba):
    rgb = rgba[..., :3].copy()
    rgb[rgba[..., 3] < 128] = 1, 2, 3
    image = Image.fromarray(rgb)
    image.info["transparency"] = (1, 2, 3)
    return image


@ONE_LAYOUT
@pytest.mark.parametrize("stored", [as_palette, as_gray, as_key_color])
def test_optimized_png_files_are_converted_to_rgba(layout, tmp_path, stored):
    sample = ellipsoid("a")
    WRITERS[layout](tmp_path / "in" / "a", sample)
    images = []
    for number, view in enumerate(sample.views):
        path = an_image(tmp_path / "in" / "a", layout).with_name(f"{number:03d}.png")
        stored(decode_image("a", view)).save(path)
        opened = Image.open(path)
        assert opened.mode != "RGBA"
        images.append(np.asarray(opened.convert("RGBA")))
    found = converted(layout, tmp_path / "in", tmp_path / "out")["a"]
    for view, image in zip(found.views, images, strict=True):
        np.testing.assert_array_equal(decode_image("a", view), image)


def test_views_are_converted_to_srgb_and_srgb_views_are_unchanged():
    rgba = np.array([[[55, 55, 55, 255], [188, 0, 255, 77]]], dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "PNG")
    plain = file.getvalue()
    srgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(rgba).save(file := io.BytesIO(), "PNG", icc_profile=srgb_profile)
    same = [plain, file.getvalue(), png_chunk(plain, b"gAMA", struct.pack(">I", 45455))]
    same += [png_chunk(plain, b"sRGB", b"\0"), png_chunk(plain, b"cICP", bytes((1, 13, 0, 1)))]
    for content in same:
        assert to_rgba_view(content, "a.png") is content
    linear = to_rgba_view(png_chunk(plain, b"gAMA", struct.pack(">I", 100_000)), "a.png")
    # 55 / 255 of light is 128 of 255 in sRGB, 188 is 223; alpha is linear.
    assert decode_image("a", linear).tolist() == [[[128, 128, 128, 255], [223, 0, 255, 77]]]
    with pytest.raises(InputError, match=r"a\.png: expected .*found PQ, which is HDR"):
        to_rgba_view(png_chunk(plain, b"cICP", bytes((9, 16, 0, 1))), "a.png")


def test_the_exif_orientation_of_views_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("P", (3, 2))
    image.putpalette([9, 8, 7, 1, 2, 3])
    image.save(file := io.BytesIO(), "PNG", transparency=1, exif=exif)
    assert decode_image("a", to_rgba_view(file.getvalue(), "a.png")).shape == (2, 3, 4)
