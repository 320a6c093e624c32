"""Rejection of invalid objects in the layouts of other projects."""

import io
import re
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data_tools.__main__ import main
from data_tools.layouts.files import LayoutError, parse_npy, read_npz
from data_tools.layouts.registry import get_layout
from data_tools.layouts.renders import to_opencv_poses
from data_tools.quality.validate import validate
from lrm_pl.data.manifest import read_manifest
from lrm_pl.data.synthetic import synthetic_sample
from lrm_pl.errors import InputError
from tests.data_tools.layout_folders import (
    FLIP,
    ONE_LAYOUT,
    VIEWS,
    WRITERS,
    an_image,
    converted,
    ellipsoid,
    png_chunk,
    reasons,
    write_zero123,
)


def a_pose(folder, layout):
    return {
        "openlrm": folder / "pose" / "003.npy",
        "zero123": folder / "003.npy",
        "instantmesh": folder / "cameras.npz",
    }[layout]


def bad_objects(root, layout):
    """Write one object for each type of error, and yield its name and a pattern of the reason."""
    for name, said in (
        ("missing-pose", "expected a file .*, but found none"),
        ("pickle", "without pickling|expected a NumPy array"),
        ("stretched-pose", "expected rigid poses|look at the origin"),
        ("corrupt-image", "expected a PNG or WebP view"),
        ("text-bomb-first", "expected a PNG or WebP view"),
        ("huge-image", "at most 4096 pixels per side, but found"),
        (
            "missing-image",
            f"expected {VIEWS} views of 32 x 32 pixels, as for most objects, but found {VIEWS - 1}",
        ),
        ("other-size", "as for most objects, but found 6 views of 64 x 64 pixels"),
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
    """Return a small PNG file with a large size in the header."""
    image = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(image, format="PNG")
    content = bytearray(image.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@ONE_LAYOUT
def test_two_images_with_the_same_number_are_rejected(layout, tmp_path):
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


@ONE_LAYOUT
def test_a_folder_that_cannot_be_listed_is_an_error(layout, tmp_path):
    with pytest.raises(LayoutError, match=r"expected a readable folder, but found .*No such file"):
        converted(layout, tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    "layout", ["openlrm", "instantmesh", pytest.param("zero123", marks=pytest.mark.soak)], indirect=True
)
def test_invalid_objects_are_reported_and_the_others_converted(layout, tmp_path, capsys):
    expected = dict(bad_objects(tmp_path / "in", layout))
    for key in ("a", "b"):
        WRITERS[layout](tmp_path / "in" / key, ellipsoid(key))
    folders = ["--folder", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    arguments = ["convert", "--from", layout, *folders]
    assert main([*arguments, "--held-out", "0"]) == 0
    said = capsys.readouterr().out
    assert f"2 objects in 1 shard, {len(expected)} skipped\nreasons " in said
    assert said.splitlines()[-1] == f"next           make train DATA={tmp_path / 'out'}"
    found = reasons(tmp_path / "out")
    assert set(found) == set(expected)
    for name, pattern in expected.items():
        assert re.search(pattern, found[name]), (name, found[name])
    assert read_manifest(tmp_path / "out").failures == len(expected)
    assert validate(tmp_path / "out") == 0


@ONE_LAYOUT
def test_a_conversion_without_usable_objects_writes_only_the_reasons(layout, tmp_path, capsys):
    WRITERS[layout](tmp_path / "in" / "a", ellipsoid("a"))
    a_pose(tmp_path / "in" / "a", layout).unlink()
    folders = ["--folder", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    arguments = ["convert", "--from", layout, *folders]
    assert main(arguments) == 1
    assert re.search(
        r"found none among 1 object\. .*failures.jsonl.*expected a file", capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert "a" in (tmp_path / "out.failures.jsonl").read_text()
    (tmp_path / "empty").mkdir()
    assert main([*arguments[:4], str(tmp_path / "empty"), *arguments[5:]]) == 1
    assert f"expected objects in the layout of {layout}, but found no objects" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["openlrm", "zero123"], indirect=True)
def test_poses_of_another_convention_are_rejected(layout, tmp_path):
    for key, change in (("opencv", FLIP), ("inverted", None)):
        sample = ellipsoid("a")
        c2w = sample.c2w @ FLIP if change is not None else np.linalg.inv(sample.c2w)
        sample.c2w[:] = c2w
        WRITERS[layout](tmp_path / "in" / key, sample)
    with pytest.raises(
        InputError,
        match="silhouettes, but found a mean distance of 6",
    ):
        converted(layout, tmp_path / "in", tmp_path / "out")


def test_the_convention_of_instantmesh_poses_is_detected():
    c2w = ellipsoid("a").c2w.astype(np.float64)
    w2c = np.linalg.inv(c2w)
    for matrices in (np.linalg.inv(c2w @ FLIP), c2w @ FLIP, w2c, c2w):
        np.testing.assert_allclose(to_opencv_poses(matrices, "here"), c2w, atol=2e-6)
    with pytest.raises(
        LayoutError, match="here: expected cameras that look at the origin, but found other directions"
    ):
        to_opencv_poses(c2w + 0.3 * np.eye(4)[:, [0, 1, 3, 2]], "here")


def test_malicious_arrays_and_archives_are_rejected(tmp_path):
    def npy(header, numbers):
        text = header.encode().ljust(117) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + numbers

    fine = npy("{'descr': '<f8', 'fortran_order': True, 'shape': (2, 2)}", struct.pack("<4d", 1, 2, 3, 4))
    assert parse_npy(fine, "x").tolist() == [[1, 3], [2, 4]]
    for header in (
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-2, -2)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000000000000,)}",
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
    with pytest.raises(InputError, match=r"at most 1048576 bytes in cam_poses\.npy, but found 16777216"):
        read_npz(bomb, "cam_poses")
    with pytest.raises(LayoutError, match="expected an array with the name other, but found none"):
        read_npz(bomb, "other")
    bomb.write_bytes(b"no archive")
    with pytest.raises(InputError, match="expected a zip file, but found File is not a zip file"):
        read_npz(bomb, "cam_poses")


def test_options_of_another_layout_and_out_of_range_numbers_are_rejected(tmp_path):
    with pytest.raises(
        LayoutError, match="--from mvimgnet if --views or --masks is passed, but found --from openlrm"
    ):
        get_layout("openlrm", tmp_path, views=8)
    with pytest.raises(LayoutError, match="expected a value of --res from 1 to 4096, but found 0"):
        get_layout("mvimgnet", tmp_path, resolution=0)


def test_two_objects_with_the_same_id_are_rejected(tmp_path):
    for name in ("a b", "a_b"):
        write_zero123(tmp_path / "in" / name, ellipsoid("a"))
    with pytest.raises(InputError, match="found a b and a_b with the id 'a_b'"):
        converted("zero123", tmp_path / "in", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
