"""Rejection of invalid MVImgNet videos."""

import struct

import numpy as np
import pytest
from PIL import Image

from data_tools.layouts.colmap import read_model
from data_tools.layouts.files import LayoutError
from data_tools.layouts.registry import get_layout
from lrm_pl.data.synthetic import synthetic_sample
from lrm_pl.errors import InputError
from tests.data_tools.mvimgnet_videos import FISHEYE, FRAMES, SIDE, missing, reason, write_model, write_video


def truncated(path):
    path.write_bytes(path.read_bytes()[:-30])


def prolonged(path):
    path.write_bytes(path.read_bytes() + b"\0")


def lying(path):
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def short_counted(path):
    path.write_bytes(struct.pack("<Q", 3) + path.read_bytes()[8:])


def not_finite(path):
    content = bytearray(path.read_bytes())
    content[12:20] = struct.pack("<d", np.nan)
    path.write_bytes(bytes(content))


def leaving(path):
    path.write_bytes(path.read_bytes().replace(b"001.jpg", b"../1jpg"))


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin"])
@pytest.mark.parametrize("damage", [truncated, prolonged, lying, missing])
def test_a_colmap_file_of_unexpected_size_is_rejected(tmp_path, name, damage):
    write_model(tmp_path / "0", [np.eye(4)[:3]] * 2, [100.0, 100, 64, 64])
    damage(tmp_path / "0" / name)
    with pytest.raises(LayoutError, match=name):
        read_model(tmp_path / "0")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (short_counted, r"images\.bin: expected \d+ bytes, but found"),
        (not_finite, "expected a valid pose and camera id, but found .*nan"),
        (leaving, r"expected file names without folders in images\.bin, but found '\.\./1jpg'"),
    ],
)
def test_invalid_poses_and_file_names_are_rejected(video, damage, said):
    folder, _ = video
    damage(folder / "sparse" / "0" / "images.bin")
    with pytest.raises(LayoutError, match=said):
        get_layout("mvimgnet", folder.parents[1], 64, FRAMES).read(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("images/003.jpg", b"nothing", r"003\.jpg: expected an image .*, but found 7 bytes"),
        ("masks/003.jpg.png", b"nothing", r"003\.jpg\.png: expected an image .*, but found 7 bytes"),
        ("images/003.jpg", None, "expected 128 x 128 pixels according to the camera, but found 9000 x 100"),
        ("masks/003.jpg.png", None, "expected 128 x 128 pixels according to the camera"),
    ],
)
def test_damaged_images_and_images_of_unexpected_size_are_rejected(video, name, content, said):
    folder, _ = video
    if content is None:
        Image.new("L", (9000, 100), 255).save(folder / name)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        get_layout("mvimgnet", folder.parents[1], 64, FRAMES).read(folder)


def test_an_unsupported_camera_model_and_invalid_intrinsics_are_rejected(tmp_path):
    write_model(tmp_path / "a", [], [100.0, 100, 64, 64, 0, 0, 0, 0], FISHEYE)
    with pytest.raises(LayoutError, match=r"expected a pinhole, .*found model id 5"):
        read_model(tmp_path / "a")
    write_model(tmp_path / "b", [], [-100.0, 100, 64, 64])
    with pytest.raises(LayoutError, match="expected valid intrinsics, but found 128 x 128 pixels"):
        read_model(tmp_path / "b")


def test_cameras_that_do_not_surround_an_object_are_rejected(tmp_path):
    sample = synthetic_sample("a", FRAMES, SIDE, 0)
    still = np.repeat(sample.c2w[:1], FRAMES, axis=0)
    away = sample.c2w.copy()
    away[:, :3, :3] = away[:, :3, :3] @ np.diag([-1, 1, -1]).astype(
        np.float32
    )  # rotated by 180 degrees around the up axes
    for name, c2w, said in (
        ("still", still, "look in one direction"),
        ("away", away, "found it behind camera"),
    ):
        sample.c2w[:] = c2w
        write_video(tmp_path / name / "7" / "a", sample, tmp_path / name / "7" / "a" / "masks")
        assert said in reason(tmp_path / name / "7" / "a", tmp_path / "out")
