"""Conversion of MVImgNet videos to shards."""

import dataclasses
import hashlib
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data_tools.__main__ import main
from data_tools.layouts.colmap import Camera, read_model
from data_tools.layouts.files import LayoutError
from data_tools.layouts.object_frame import ObjectOutline, to_object_frame
from data_tools.quality.validate import validate
from lrm_pl.conventions import rigid_error
from lrm_pl.data.manifest import read_manifest, read_samples
from lrm_pl.data.schema import decode_image, decode_sample
from lrm_pl.data.synthetic import synthetic_sample
from tests.data_tools.mvimgnet_videos import (
    FRAMES,
    OPENCV,
    PINHOLE,
    RADIAL,
    SIDE,
    SIMPLE_PINHOLE,
    SIMPLE_RADIAL,
    converted,
    missing,
    reason,
    write_model,
    write_video,
)


def similarity(c2w, target):
    """Fit target = s R x + t to camera positions (Umeyama), and return s, R, t."""
    x, y = c2w[:, :3, 3], target[:, :3, 3]
    u, spread, vt = np.linalg.svd((y - y.mean(0)).T @ (x - x.mean(0)))
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(spread) @ sign) / ((x - x.mean(0)) ** 2).sum()
    return scale, rotation, y.mean(0) - scale * rotation @ x.mean(0)


def projected(points, c2w, fxfycxcy):
    local = (points - c2w[:3, 3]) @ c2w[:3, :3]
    return local[:, :2] / local[:, 2:] * fxfycxcy[:2] + fxfycxcy[2:]


def box(alpha):
    rows, columns = (np.flatnonzero((alpha > 127).any(axis=axis)) for axis in (1, 0))
    return np.array([columns[0], rows[0]]), np.array([columns[-1] + 1, rows[-1] + 1])


def test_cameras_are_preserved_up_to_a_similarity_transform(video, tmp_path):
    folder, sample = video
    found = converted(folder.parents[1], tmp_path / "out")["7_1a2b"]
    c2w, before = found.c2w.astype(np.float64), sample.c2w.astype(np.float64)
    scale, rotation, offset = similarity(before, c2w)
    np.testing.assert_allclose(c2w[:, :3, 3], scale * before[:, :3, 3] @ rotation.T + offset, atol=1e-5)
    np.testing.assert_allclose(c2w[:, :3, :3], rotation @ before[:, :3, :3], atol=1e-5)
    np.testing.assert_allclose(rotation[2], [0, 0, 1], atol=1e-5, err_msg="the up axis is +z")
    np.testing.assert_allclose(offset, 0, atol=0.02, err_msg="the center of the ellipsoid is the origin")
    right, forward = c2w[0, :3, 0], c2w[0, :3, 2]
    np.testing.assert_allclose(right, [1, 0, 0], atol=1e-5, err_msg="the first camera is on the side -y")
    assert forward[1] > 0
    points = np.random.default_rng(0).uniform(-0.3, 0.3, (50, 3))
    for view in range(FRAMES):
        (low, high), (new_low, new_high) = (
            box(decode_image("a", views[view])[..., 3]) for views in (sample.views, found.views)
        )
        expected = projected(points, before[view], sample.fxfycxcy[view]) * SIDE
        expected = new_low + (expected - low) * (new_high - new_low) / (high - low)  # relative to the mask
        again = projected(scale * points @ rotation.T + offset, c2w[view], found.fxfycxcy[view]) * 64
        assert np.abs(again - expected).max() < 1
    assert validate(tmp_path / "out") == 0
    manifest = read_manifest(tmp_path / "out")
    settings = manifest.render
    assert (manifest.views, settings["normalize"], settings["resolution"]) == (FRAMES, "sphere", 64)


def test_the_object_is_scaled_to_the_unit_sphere(video, tmp_path):
    folder, sample = video
    found = converted(folder.parents[1], tmp_path / "out")["7_1a2b"]
    scale, _, _ = similarity(sample.c2w.astype(np.float64), found.c2w.astype(np.float64))
    seed = int.from_bytes(hashlib.sha256(b"0/a").digest()[:8], "little")
    longest = np.random.default_rng(seed).uniform(0.4, 0.95, 3).max()  # the semi-axes of the ellipsoid
    assert 0.95 < scale * longest < 1.05
    ratio = np.linalg.norm(found.c2w[:, :3, 3], axis=1) / (scale * longest)
    np.testing.assert_allclose(ratio, 2.6 / longest, rtol=0.02)


def test_an_arc_of_90_degrees_determines_the_up_axis_and_the_center(tmp_path):
    sample = synthetic_sample("a", 32, SIDE, 0)
    sample = dataclasses.replace(
        sample, c2w=sample.c2w[:8], fxfycxcy=sample.fxfycxcy[:8], views=sample.views[:8]
    )
    write_video(tmp_path / "in" / "7" / "a", sample, tmp_path / "in" / "7" / "a" / "masks")
    found = converted(tmp_path / "in", tmp_path / "out", views=8)["7_a"]
    scale, rotation, offset = similarity(sample.c2w.astype(np.float64), found.c2w.astype(np.float64))
    np.testing.assert_allclose(rotation[2], [0, 0, 1], atol=1e-4)
    assert np.abs(offset).max() < 0.12
    assert 0.9 < scale < 1.6


def test_the_up_axis_is_accurate_for_cameras_with_random_roll():
    rng, sightings, before = np.random.default_rng(0), [], []
    middle = np.array([5.0, -3.0, 2.0])
    for c2w in synthetic_sample("a", 24, 8, 0).c2w.astype(np.float64):
        roll = np.radians(rng.normal(0, 3))
        c2w[:3, :2] = c2w[:3, :2] @ [[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]]
        c2w[:3, 3] = 10 * c2w[:3, 3] + middle  # a sphere of radius 4 far from the origin
        toward = middle - c2w[:3, 3]
        distance = np.linalg.norm(toward)
        rays = toward + np.stack([c2w[:3, 0], -c2w[:3, 1]]) * distance * np.tan(np.arcsin(4 / distance))
        rays /= np.linalg.norm(rays, axis=1, keepdims=True)
        sightings.append(ObjectOutline(c2w, rays, toward / distance))
        before.append(c2w)
    framed = to_object_frame(sightings, "here")
    assert rigid_error(framed) < 1e-6
    np.testing.assert_allclose(np.linalg.norm(framed[:, :3, 3], axis=1), 26 / 4, rtol=1e-6)
    _, rotation, _ = similarity(np.stack(before), framed)
    assert np.degrees(np.arccos(rotation[2, 2])) < 3
    with pytest.raises(LayoutError, match="look in one direction"):
        to_object_frame(sightings[:1], "here")


def test_views_are_square_crops_around_the_mask_without_background(video, tmp_path):
    folder, _ = video
    found = converted(folder.parents[1], tmp_path / "out", resolution=96)["7_1a2b"]
    for view in found.views:
        rgba = decode_image("a", view)
        assert rgba.shape == (96, 96, 4)
        low, high = box(rgba[..., 3])
        assert (high - low).max() == pytest.approx(96 / 1.2, abs=2), "a margin of 10 % per side"
        assert np.abs((low + high) / 2 - 48).max() <= 1.5
        inside = rgba[rgba[..., 3] > 32].astype(int)
        assert inside[:, 1].max() < 250, "no green background at the edge"
    assert np.isclose(found.fxfycxcy[:, 0], found.fxfycxcy[:, 1]).all()


def test_masks_are_read_from_a_separate_folder_and_views_are_evenly_spaced(tmp_path, capsys):
    for key in ("a", "b"):
        sample = synthetic_sample(key, FRAMES, SIDE, 0)
        write_video(tmp_path / "in" / "7" / key, sample, tmp_path / "masks" / "7" / key)
    folders = ["--folder", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    arguments = ["convert", "--from", "mvimgnet", *folders]
    assert main([*arguments, "--masks", str(tmp_path / "masks"), "--views", "5", "--res", "32"]) == 0
    assert "2 objects in 1 shard, 0 skipped" in capsys.readouterr().out
    all_views = converted(tmp_path / "in", tmp_path / "all", resolution=32, masks=tmp_path / "masks")["7_a"]
    assert read_manifest(tmp_path / "out").views == 5
    (shard,) = read_manifest(tmp_path / "out").shards
    found = {key: decode_sample(key, members) for key, members in read_samples(tmp_path / "out", shard)}
    assert found["7_a"].views == all_views.views[::2]


def test_frames_are_converted_to_srgb_without_rotation_and_masks_may_have_16_bits(video, tmp_path):
    folder, _ = video
    (before,) = converted(tmp_path / "in", tmp_path / "plain").values()
    exif = Image.Exif()
    exif[0x0112] = 6  # COLMAP ignores the EXIF orientation
    for path in sorted((folder / "masks").iterdir()):
        soft = np.where(np.asarray(Image.open(path)) > 127, 65535, 20000).astype(np.uint16)
        Image.fromarray(soft).save(path)
    views = []
    for name, color_space in (("srgb", 1), ("adobe", 2)):
        exif.get_ifd(0x8769)[0xA001] = color_space
        for path in sorted((folder / "images").iterdir()):
            image = Image.open(io.BytesIO(path.read_bytes()))
            image.save(path, quality="keep", exif=exif)
        (sample,) = converted(tmp_path / "in", tmp_path / name).values()
        np.testing.assert_array_equal(sample.c2w, before.c2w)
        views.append(decode_image("a", sample.views[0]).astype(int))
    plain = decode_image("a", before.views[0])
    solid = plain[..., 3] == 255
    assert set(np.unique(views[0][..., 3])) >= {78, 255}, "20000 of 65535 is 78 of 255"
    assert np.abs(views[0][solid] - plain[solid]).max() <= 2, (
        "edges are weighted by another alpha, and no more"
    )
    assert np.abs(views[1][solid] - views[0][solid]).max() > 10


def test_frames_with_a_missing_empty_or_cropped_mask_are_not_used(video, tmp_path):
    folder, _ = video
    (folder / "masks" / "001.jpg.png").unlink()
    (folder / "images" / "002.jpg").unlink()
    Image.new("L", (SIDE, SIDE)).save(folder / "masks" / "003.jpg.png")
    Image.new("L", (SIDE, SIDE), 255).save(folder / "masks" / "004.jpg.png")
    for name, edge in (("005", np.s_[0, 40:60]), ("006", np.s_[-1, 40:60]), ("007", np.s_[40:60, 0])):
        mask = np.array(Image.open(folder / "masks" / f"{name}.jpg.png"))
        mask[edge] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{name}.jpg.png")
    said = reason(folder, tmp_path / "out", views=4)
    assert (
        "expected at least 4 usable views, but found 3 of 10 (1 without a mask, 1 without an image, " in said
    )
    assert "1 with an empty mask, 4 cropped by the image border" in said
    found = converted(folder.parents[1], tmp_path / "three", views=3)["7_1a2b"]
    assert found.info.views == 3


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (SIMPLE_PINHOLE, [137.0, 64, 64]),
        (PINHOLE, [137.0, 137.0, 64, 64]),
        (SIMPLE_RADIAL, [137.0, 64, 64, 0.01]),
        (RADIAL, [137.0, 64, 64, 0.01, 0]),
        (OPENCV, [137.0, 137.0, 64, 64, 0.01, 0, 0, 0]),
    ],
)
def test_all_camera_models_are_supported(tmp_path, model, parameters):
    write_model(tmp_path / "0", [np.eye(4)[:3]], parameters, model)
    (image,) = read_model(tmp_path / "0")
    k1 = 0.01 if model >= SIMPLE_RADIAL else 0.0
    assert image.camera == Camera(SIDE, SIDE, 137.0, 137.0, 64.0, 64.0, k1)


def test_lens_distortion_above_one_percent_of_the_crop_is_rejected(video, tmp_path):
    camera = Camera(200, 100, 100.0, 50.0, 100.0, 50.0, k1=0.1, k2=0.01, p1=0.001, p2=0.002)
    # x = 1, y = 2, r^2 = 5: radial 0.5 + 0.25; dx = 0.75 + 2 p1 2 + p2 (5 + 2), dy = 1.5 + 2 p2 2 + p1 (5 + 8)
    dx, dy = 0.75 + 0.004 + 0.014, 1.5 + 0.008 + 0.013
    assert camera.displacement(np.array([[200.0, 150.0]]))[0] == pytest.approx(np.hypot(100 * dx, 50 * dy))
    assert camera.displacement(np.array([[100.0, 50.0]]))[0] == 0
    _, sample = video
    focal = float(sample.fxfycxcy[0, 0]) * SIDE
    for name, k in (("mild", 0.02), ("strong", 0.2)):
        write_video(
            tmp_path / name / "7" / "a", sample, tmp_path / name / "7" / "a" / "masks", [focal, 64, 64, k], 2
        )
    converted(tmp_path / "mild", tmp_path / "mild-out")
    said = reason(tmp_path / "strong" / "7" / "a", tmp_path / "out")
    assert "expected lens distortion of at most 1% of the side of the crop, but found" in said


def test_an_object_with_a_damaged_model_is_reported(video, tmp_path):
    folder, _ = video
    shutil.copytree(folder, folder.parent / "bad")
    missing(folder.parent / "bad" / "sparse" / "0" / "images.bin")
    found = converted(folder.parents[1], tmp_path / "out")
    assert set(found) == {"7_1a2b"}
    (line,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["id"], record["file"]) == ("7_bad", "7/bad")
    assert "images.bin, but found none" in record["reason"]
