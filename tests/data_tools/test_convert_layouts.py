"""Folders in others' layouts made into shards: the cameras and images that come out are those that went in."""

import io
import json
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from data_tools.__main__ import main
from data_tools.layouts.files import LayoutError, parse_npy, read_npz, to_rgba_view
from data_tools.layouts.instantmesh import to_opencv_poses
from data_tools.layouts.registry import get_layout
from data_tools.quality.validate import validate
from data_tools.shards.convert import convert
from lrm_pl.data.manifest import read_manifest, read_samples
from lrm_pl.data.schema import decode_image, decode_sample
from lrm_pl.data.synthetic import synthetic_sample
from lrm_pl.errors import InputError

VIEWS = 6

#: Blender's camera (x right, y up, z backward) against OpenCV's (x right, y down, z forward).
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def opengl_w2c(sample):
    return np.linalg.inv(sample.c2w.astype(np.float64) @ FLIP)


def write_images(folder, sample):
    folder.mkdir(parents=True, exist_ok=True)
    for number, view in enumerate(sample.views):
        (folder / f"{number:03d}.png").write_bytes(view)


def write_openlrm(folder, sample):
    write_images(folder / "rgba", sample)
    (folder / "pose").mkdir()
    for number, c2w in enumerate(sample.c2w):
        np.save(folder / "pose" / f"{number:03d}.npy", (c2w @ FLIP)[:3])
    (fx, fy, cx, cy), (width, height) = (
        sample.fxfycxcy[0],
        (1024, 1024),
    )  # the images were made smaller since
    np.save(
        folder / "intrinsics.npy", [[fx * width, fy * height], [cx * width, cy * height], [width, height]]
    )


def write_zero123(folder, sample):
    write_images(folder, sample)
    for number, w2c in enumerate(opengl_w2c(sample)):
        w2c[:3, 3] /= 2  # the object's longest side is 1 there
        np.save(folder / f"{number:03d}.npy", w2c[:3])


def write_instantmesh(folder, sample, poses=None):
    write_images(folder, sample)
    (folder / "000_normal.png").write_bytes(sample.views[0])
    (folder / "000_depth.png").write_bytes(sample.views[0])
    np.savez(folder / "cameras.npz", cam_poses=opengl_w2c(sample)[:, :3] if poses is None else poses)


WRITERS = {"openlrm": write_openlrm, "zero123": write_zero123, "instantmesh": write_instantmesh}


@pytest.fixture(params=sorted(WRITERS))
def layout(request, monkeypatch):
    """A layout, and ellipsoids seen by the lens that it has."""
    if request.param == "zero123":  # lens 35 mm, sensor 32 mm
        monkeypatch.setattr("lrm_pl.data.synthetic.FOV_DEG", 2 * np.degrees(np.arctan(16 / 35)))
    return request.param


def ellipsoid(key):
    return synthetic_sample(key, VIEWS, 32, 0)


def converted(layout, root, out, **options):
    manifest = convert(get_layout(layout, root), root, out, **options)
    samples = {}
    for shard in manifest.shards:
        for key, members in read_samples(out, shard):
            samples[key] = decode_sample(key, members)
    return samples


def reasons(out):
    records = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    return {record["id"]: record["reason"] for record in records}


def test_cameras_and_images_come_out_as_they_went_in(layout, tmp_path):
    went_in = {key: ellipsoid(key) for key in ("a", "b", "c")}
    for key, sample in went_in.items():
        WRITERS[layout](tmp_path / "in" / "000-023" / key, sample)  # folders of folders are searched
    came_out = converted(layout, tmp_path / "in", tmp_path / "out", held_out=1, shard_size=1)
    assert set(came_out) == {"000-023_a", "000-023_b", "000-023_c"}
    for key, sample in went_in.items():
        found = came_out[f"000-023_{key}"]
        np.testing.assert_allclose(found.c2w, sample.c2w, atol=2e-6)
        np.testing.assert_allclose(found.fxfycxcy, sample.fxfycxcy, atol=1e-6)
        assert found.views == sample.views, "to the byte"
        assert (found.info.name, found.info.license, found.info.source) == (key, "unknown", f"000-023/{key}")
        assert found.info.renderer == f"converted from {layout}"
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.views, manifest.failures, manifest.render["normalize"]) == (VIEWS, 0, "cube")
    assert [shard.split for shard in manifest.shards] == ["train", "train", "val"]
    assert validate(tmp_path / "out") == 0
    assert (tmp_path / "out" / "contact_sheet.png").is_file()
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]


def test_an_object_is_not_searched_for_others(layout, tmp_path):
    for folder in (tmp_path / "in" / "a", tmp_path / "in" / "a" / "before"):
        WRITERS[layout](folder, ellipsoid("a"))
    assert set(converted(layout, tmp_path / "in", tmp_path / "out")) == {"a"}


def test_an_object_without_its_first_view_is_named_and_not_overlooked(layout, tmp_path):
    for key in ("a", "b", "c"):
        WRITERS[layout](tmp_path / "in" / key, ellipsoid(key))
    for path in (tmp_path / "in" / "b").rglob("000.*"):
        path.unlink()
    assert set(converted(layout, tmp_path / "in", tmp_path / "out")) == {"a", "c"}
    assert (
        f"expected {VIEWS} views of 32 x 32 pixels, as most objects have, but found {VIEWS - 1}"
        in reasons(tmp_path / "out")["b"]
    )


def test_a_resolution_makes_images_smaller_and_keeps_cameras(layout, tmp_path):
    WRITERS[layout](tmp_path / "in" / "a", ellipsoid("a"))
    found = converted(layout, tmp_path / "in", tmp_path / "out", resolution=16)["a"]
    assert {decode_image("a", view).shape for view in found.views} == {(16, 16, 4)}
    np.testing.assert_allclose(found.c2w, ellipsoid("a").c2w, atol=2e-6)
    assert validate(tmp_path / "out") == 0


def a_pose(folder, layout):
    return {
        "openlrm": folder / "pose" / "003.npy",
        "zero123": folder / "003.npy",
        "instantmesh": folder / "cameras.npz",
    }[layout]


def an_image(folder, layout):
    return (folder / "rgba" if layout == "openlrm" else folder) / "003.png"


def bad_objects(root, layout):
    """Write one object for each thing that can be wrong; yields its name and what must be said of it."""
    for name, said in (
        ("missing-pose", "expected a file .*, but found none"),
        ("pickle", "without pickling|expected a NumPy array"),
        ("stretched-pose", "expected rigid poses|look at the origin"),
        ("corrupt-image", "expected a PNG or WebP view"),
        ("text-bomb-first", "expected a PNG or WebP view"),
        ("huge-image", "at most 4096 pixels a side, but found"),
        (
            "missing-image",
            f"expected {VIEWS} views of 32 x 32 pixels, as most objects have, but found {VIEWS - 1}",
        ),
        ("other-size", "as most objects have, but found 6 views of 64 x 64 pixels"),
        ("opaque-image", "expected RGBA views, but found mode RGB"),
        ("opaque-palette", "expected RGBA views, but found mode P"),
        ("hdr-image", r"003\.png: expected .*found PQ, which is HDR"),
        ("cut-image", r"003\.png: expected .* the aspect ratio of the camera, but found 32 x 24"),
        ("too-large", "cameras that fit the silhouettes"),
    ):
        folder = root / name
        sample = synthetic_sample(name, VIEWS, 64 if name == "other-size" else 32, 0)
        if name == "too-large":
            sample.c2w[:, :3, 3] *= 3
        WRITERS[layout](folder, sample)
        pose, image = a_pose(folder, layout), an_image(folder, layout)
        if name == "missing-pose":
            pose.unlink()
        elif name == "pickle":
            hostile = np.array([print], dtype=object)
            np.savez(pose, cam_poses=hostile) if layout == "instantmesh" else np.save(pose, hostile)
        elif name == "stretched-pose":
            matrix = np.load(pose)["cam_poses"] if layout == "instantmesh" else np.load(pose)
            matrix[..., :3, :3] *= 1.01
            np.savez(pose, cam_poses=matrix) if layout == "instantmesh" else np.save(pose, matrix)
        elif name == "corrupt-image":
            image.write_bytes(image.read_bytes()[:100])
        elif name == "text-bomb-first":
            text = PngInfo()
            text.add_text("a", "x" * 3_000_000, zip=True)
            Image.new("RGBA", (32, 32)).save(image.with_name("000.png"), pnginfo=text)
        elif name == "huge-image":
            image.write_bytes(png_of_declared_size(5000, 5000))
        elif name == "missing-image":
            image.unlink()
        elif name == "cut-image":
            Image.open(image).crop((0, 4, 32, 28)).save(image)
        elif name == "opaque-image":
            Image.open(image).convert("RGB").save(image)
        elif name == "opaque-palette":
            Image.open(image).convert("RGB").quantize(16).save(image)
        elif name == "hdr-image":
            opened = Image.open(image)
            opened.save(image)
            image.write_bytes(png_chunk(image.read_bytes(), b"cICP", bytes((9, 16, 0, 1))))
        yield name, said


def png_of_declared_size(width, height):
    """A PNG of a hundred bytes that says it is large."""
    image = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(image, format="PNG")
    content = bytearray(image.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def test_one_number_twice_is_refused_and_named(layout, tmp_path):
    for key in ("a", "both", "short"):
        WRITERS[layout](tmp_path / "in" / key, ellipsoid(key))
    image = an_image(tmp_path / "in" / "both", layout)
    Image.open(image).save(image.with_suffix(".webp"), lossless=True)
    image = an_image(tmp_path / "in" / "short", layout)
    image.with_name("3.png").write_bytes(image.read_bytes())
    assert set(converted(layout, tmp_path / "in", tmp_path / "out")) == {"a"}
    found = reasons(tmp_path / "out")
    assert "expected one image per number, but found 003.png and 003.webp. Remove one" in found["both"]
    assert "expected one image per number, but found 003.png and 3.png. Remove one" in found["short"]


def test_folders_behind_links_are_found_once_and_dead_links_are_named(layout, tmp_path):
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


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_empty(layout, tmp_path):
    with pytest.raises(LayoutError, match=r"expected readable folders, but found .*No such file"):
        converted(layout, tmp_path / "nowhere", tmp_path / "out")


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


@pytest.mark.parametrize("stored", [as_palette, as_gray, as_key_color])
def test_views_that_a_tool_made_smaller_are_the_rgba_views_that_they_stand_for(layout, tmp_path, stored):
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


def png_chunk(content, kind, data):
    """Put a chunk before a PNG's first data."""
    at = content.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content[:at] + chunk + content[at:]


def test_views_of_another_color_space_become_srgb_and_declared_srgb_keeps_its_bytes():
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
    # 55 / 255 of light is 128 of 255 in sRGB, 188 is 223; alpha has no curve.
    assert decode_image("a", linear).tolist() == [[[128, 128, 128, 255], [223, 0, 255, 77]]]
    with pytest.raises(InputError, match=r"a\.png: expected .*found PQ, which is HDR"):
        to_rgba_view(png_chunk(plain, b"cICP", bytes((9, 16, 0, 1))), "a.png")


def test_views_are_not_turned_by_exif_since_their_cameras_are_not():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("P", (3, 2))
    image.putpalette([9, 8, 7, 1, 2, 3])
    image.save(file := io.BytesIO(), "PNG", transparency=1, exif=exif)
    assert decode_image("a", to_rgba_view(file.getvalue(), "a.png")).shape == (2, 3, 4)


def test_bad_objects_are_named_and_the_others_stay(layout, tmp_path, capsys):
    expected = dict(bad_objects(tmp_path / "in", layout))
    for key in ("a", "b"):  # in one shard with some of the bad ones
        WRITERS[layout](tmp_path / "in" / key, ellipsoid(key))
    arguments = [
        "convert",
        "--from",
        layout,
        "--folder",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, "--held-out", "0"]) == 0
    said = capsys.readouterr().out
    assert f"2 objects in 1 shard, {len(expected)} left out\nwhy " in said
    assert said.splitlines()[-1] == f"next           make train DATA={tmp_path / 'out'}"
    found = reasons(tmp_path / "out")
    assert set(found) == set(expected)
    for name, pattern in expected.items():
        assert re.search(pattern, found[name]), (name, found[name])
    assert read_manifest(tmp_path / "out").failures == len(expected)
    assert validate(tmp_path / "out") == 0


def test_where_all_objects_are_bad_nothing_takes_the_name_and_the_reasons_stay(layout, tmp_path, capsys):
    WRITERS[layout](tmp_path / "in" / "a", ellipsoid("a"))
    a_pose(tmp_path / "in" / "a", layout).unlink()
    arguments = [
        "convert",
        "--from",
        layout,
        "--folder",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 1
    assert re.search(
        r"found none among 1 that can be used\. .*failures.jsonl .*expected a file", capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert "a" in (tmp_path / "out.failures.jsonl").read_text()
    (tmp_path / "empty").mkdir()
    assert main([*arguments[:4], str(tmp_path / "empty"), *arguments[5:]]) == 1
    assert f"expected objects as {layout} lays them out, but found none" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["openlrm", "zero123"], indirect=True)
def test_poses_of_another_convention_are_refused_at_conversion(layout, tmp_path):
    for key, change in (("opencv", FLIP), ("inverted", None)):
        sample = ellipsoid("a")
        c2w = sample.c2w @ FLIP if change is not None else np.linalg.inv(sample.c2w)
        sample.c2w[:] = c2w
        WRITERS[layout](tmp_path / "in" / key, sample)
    with pytest.raises(
        InputError,
        match="silhouettes, but found that what view 0 shows is, on average, 6",
    ):
        converted(layout, tmp_path / "in", tmp_path / "out")


def test_instantmesh_poses_say_which_convention_they_have():
    c2w = ellipsoid("a").c2w.astype(np.float64)
    w2c = np.linalg.inv(c2w)
    for matrices in (np.linalg.inv(c2w @ FLIP), c2w @ FLIP, w2c, c2w):
        np.testing.assert_allclose(to_opencv_poses(matrices, "here"), c2w, atol=2e-6)
    with pytest.raises(LayoutError, match="here: expected cameras that look at the origin, but found others"):
        to_opencv_poses(c2w + 0.3 * np.eye(4)[:, [0, 1, 3, 2]], "here")


def test_arrays_are_refused_by_their_header_and_archives_by_what_comes_out(tmp_path):
    def npy(header, numbers):
        text = header.encode().ljust(117) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + numbers

    fine = npy("{'descr': '<f8', 'fortran_order': True, 'shape': (2, 2)}", struct.pack("<4d", 1, 2, 3, 4))
    assert parse_npy(fine, "x").tolist() == [[1, 3], [2, 4]]
    for header in (
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-2, -2)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (4,)}",
        "{'descr': '<U8', 'fortran_order': False, 'shape': (1,)}",
        "__import__('os').abort()",
        "(" * 100,
        "",
    ):
        with pytest.raises(LayoutError, match="x: expected"):
            parse_npy(npy(header, struct.pack("<4d", 1, 2, 3, 4)), "x")
    for content in (b"", b"\x93NUMPY", b"\x93NUMPY\x03\x00", fine[:-1], fine + b"\0"):
        with pytest.raises(LayoutError, match="x: expected"):
            parse_npy(content, "x")
    bomb = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cam_poses.npy", bytes(1 << 24))
    assert bomb.stat().st_size < 1 << 16
    with pytest.raises(LayoutError, match="at most 1048576 bytes, but found more"):
        read_npz(bomb, "cam_poses")
    with pytest.raises(LayoutError, match="expected an array"):
        read_npz(bomb, "other")
    bomb.write_bytes(b"no archive")
    with pytest.raises(LayoutError, match="expected an array, but found File is not a zip file"):
        read_npz(bomb, "cam_poses")


def test_options_of_another_layout_and_strange_numbers_are_refused(tmp_path):
    with pytest.raises(
        LayoutError, match="--views and --masks with --from mvimgnet only, but found --from openlrm"
    ):
        get_layout("openlrm", tmp_path, views=8)
    with pytest.raises(LayoutError, match="expected --res from 1 to 4096, but found 0"):
        get_layout("mvimgnet", tmp_path, resolution=0)


def test_two_objects_of_one_name_are_refused_before_anything_is_made(tmp_path):
    for name in ("a b", "a_b"):
        write_zero123(tmp_path / "in" / name, ellipsoid("a"))
    with pytest.raises(InputError, match="found a b and a_b, which are both 'a_b'"):
        converted("zero123", tmp_path / "in", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
