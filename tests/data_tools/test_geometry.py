"""Depth and normal maps in repack, merge, validate, inspect and training, without Blender."""

import dataclasses
import hashlib

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.quality.geometry import back_project, check_geometry, resize_geometry
from data_tools.quality.validate import validate
from data_tools.shards.repack import repack, resized
from lrm_pl.data.geometry_views import (
    decode_depth,
    depth_member,
    encode_depth,
    encode_normals,
    normal_member,
    read_pixels,
    write_pixels,
)
from lrm_pl.data.manifest import Manifest, read_manifest, write_manifest
from lrm_pl.data.mixture import Entry
from lrm_pl.data.order import SampleLocation
from lrm_pl.data.reader import ShardReader
from lrm_pl.data.schema import SampleError, decode_image, encode_array, encode_image, encode_sample
from lrm_pl.data.source import ShardSource
from lrm_pl.data.surface import SURFACE_POINTS, decode_surface, encode_surface
from lrm_pl.data.synthetic import synthetic_sample
from lrm_pl.data.tar import write_shard
from lrm_pl.errors import InputError
from lrm_pl.meshing.triangles import sample_surface
from tests.builders import members

VIEWS, SIDE = 4, 32


def with_geometry(key, seed):
    """Return views of an ellipsoid with depth maps, and with normals that point to the camera."""
    sample = synthetic_sample(key, VIEWS, SIDE, seed)
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    radii = np.random.default_rng(int.from_bytes(digest[:8], "little")).uniform(0.4, 0.95, 3)
    extras = {}
    for view, (c2w, camera, image) in enumerate(
        zip(sample.c2w.astype(np.float64), sample.fxfycxcy, sample.views, strict=True)
    ):
        seen = decode_image("", image)[..., 3] > 0
        x, y = np.meshgrid(*((np.arange(SIDE) + 0.5) / SIDE - 0.5,) * 2)
        rays = np.stack([x, y, np.full_like(x, camera[0])], -1) / camera[0] @ c2w[:3, :3].T
        # |(origin + z ray) / radii| = 1; the ray's z in the camera is 1.
        origin, rays = c2w[:3, 3] / radii, rays / radii
        square, product = (rays**2).sum(-1), (rays * origin).sum(-1)
        root = np.sqrt(np.maximum(product**2 - square * ((origin**2).sum() - 1), 0))
        extras[depth_member(view)] = encode_depth(np.where(seen, (-product - root) / square, 0.0))
        extras[normal_member(view)] = encode_normals(np.where(seen[..., None], -c2w[:3, 2], 0.0))
    return dataclasses.replace(sample, extras=extras)


@pytest.fixture
def sample():
    return with_geometry("a", 0)


@pytest.fixture
def folder(tmp_path, sample):
    """Folder with two objects with depth and normal maps and one object without."""
    others = [synthetic_sample("b", VIEWS, SIDE, 1), with_geometry("c", 2)]
    path = tmp_path / "made"
    path.mkdir()
    content = [(s.info.id, encode_sample(s)) for s in (sample, *others)]
    shard = write_shard(path, "train-000000.tar", "train", content)
    write_manifest(path, Manifest((shard,), VIEWS, 0, {"normalize": "sphere"}))
    return path


def test_depth_is_back_projected_to_known_points():
    depth = np.zeros((2, 4), np.float32)
    depth[1, 2] = 2.0  # the pixel's center is at (2.5 / 4, 1.5 / 2)
    c2w = np.eye(4, dtype=np.float32)
    c2w[:3, :3] = [(0, 0, 1), (1, 0, 0), (0, 1, 0)]  # z of the camera is x of the world
    c2w[:3, 3] = (10, 20, 30)
    # x = (0.625 - 0.5) / 0.5 * 2 = 0.5, y = (0.75 - 0.5) / 1 * 2 = 0.5
    points = back_project(depth, c2w, np.array([0.5, 1.0, 0.5, 0.5], np.float32))
    np.testing.assert_allclose(points, [(12, 20.5, 30.5)])


def test_repack_keeps_the_bytes_unless_the_size_changes(folder, shards, tmp_path):
    assert validate(folder) == 0
    for name, resolution in (("copy", None), ("same", SIDE)):
        repack([folder], tmp_path / name, resolution=resolution, shard_size=1)
        assert members(tmp_path / name) == members(folder)


def test_repack_downsamples_depth_and_normal_maps(folder, tmp_path):
    repack([folder], tmp_path / "small", resolution=SIDE // 2)
    assert validate(tmp_path / "small") == 0
    found = members(tmp_path / "small")
    assert [any(name.startswith("depth") for name in found[key][1]) for key in "abc"] == [True, False, True]
    alpha = decode_image("a", found["a"][1]["view_002.webp"])[..., 3]
    depth = decode_depth("a", "depth_002.png", found["a"][1]["depth_002.png"])
    assert depth.shape == (16, 16)
    assert not depth[alpha == 0].any()
    before = decode_depth("a", "depth_002.png", members(folder)["a"][1]["depth_002.png"])[1::2, 1::2]
    np.testing.assert_allclose(depth[alpha == 255], before[alpha == 255], atol=8 / 65535)


def test_depth_and_normal_maps_are_downsampled_without_averaging(sample):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:, 1:] = 255
    depth = np.array([[0, 1, 2, 3], [0, 5, 6, 7], [0, 1, 1, 2], [0, 0, 2, 2]], dtype=np.float64)
    normals = np.zeros((4, 4, 3))
    normals[:, 1:2], normals[:, 2:] = (1, 0, 0), (0, 0, 1)
    extras = {"depth_000.png": encode_depth(depth), "normal_000.png": encode_normals(normals)}
    views = (encode_image(rgba), *sample.views[1:])
    one = dataclasses.replace(sample, views=views, extras=extras)
    small = resize_geometry(one, (resized("a", views[0], 2), *views[1:]))
    # The lower right pixels of the blocks of four pixels are 5, 7, 0 and 2.
    np.testing.assert_allclose(
        decode_depth("a", "depth_000.png", small["depth_000.png"]), [[5, 7], [0, 2]], atol=8 / 65535
    )
    assert read_pixels("a", "normal_000.png", small["normal_000.png"]).tolist() == [
        [[255, 128, 128], [128, 128, 255]], [[255, 128, 128], [128, 128, 255]],
    ]  # fmt: skip
    faint = encode_image(np.zeros((2, 2, 4), np.uint8))
    gone = resize_geometry(one, (faint, *views[1:]))
    assert not decode_depth("a", "depth_000.png", gone["depth_000.png"]).any()
    wrong = dataclasses.replace(one, extras={"depth_000.png": encode_depth(depth[:3])})
    with pytest.raises(
        SampleError, match=r"depth_000\.png with the size \(4, 4\) of the view, but found \(3, 4\)"
    ):
        resize_geometry(wrong, (faint, *views[1:]))


def _hole(pixels, alpha):
    row, column = np.argwhere(alpha == 255)[50]
    pixels[row, column] = 0
    return pixels


def _beside(pixels, alpha):
    row, column = np.argwhere(alpha == 0)[7]
    pixels[row, column] = pixels.max(axis=(0, 1))
    return pixels


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("depth_002.png", lambda pixels, _: pixels[::2, ::2], "with the size (32, 32) of the view, but found (16, 16)"),
        ("depth_002.png", _hole, "expected values in depth_002.png where alpha is 255, but found 0 at 1 of"),
        ("depth_002.png", _beside, "expected depth_002.png to be 0 where alpha is 0, but found other values at 1"),
        ("depth_002.png", lambda pixels, _: pixels * 2, "points of depth_002.png within [-1, 1]^3, but found"),
        ("depth_002.png", lambda pixels, _: (pixels >> 8).astype(np.uint8), "in depth_002.png, but found mode L"),
        ("depth_002.png", None, "depth maps of all 4 views, but found 3 (depth_002.png is missing)"),
        ("normal_001.png", lambda pixels, _: pixels[:, 1:], r"with the size (32, 32) of the view, but found (32, 31)"),
        ("normal_001.png", _hole, "expected values in normal_001.png where alpha is 255, but found 0 at 1 of"),
        ("normal_001.png", _beside, "expected normal_001.png to be 0 where alpha is 0, but found other values at 1"),
        ("normal_001.png", lambda pixels, _: pixels // 2, "expected normals of length 0 or 1 in normal_001.png"),
        ("normal_001.png", None, "normal maps of all 4 views, but found 3 (normal_001.png is missing)"),
    ],
)  # fmt: skip
def test_invalid_maps_are_reported_with_shard_sample_and_member(folder, capsys, name, change, message):
    content = members(folder)
    extras = content["c"][1]
    encoded = extras.pop(name)
    if change:
        alpha = decode_image("c", extras[f"view_{name[-7:-4]}.webp"])[..., 3]
        extras[name] = write_pixels(change(read_pixels("c", name, encoded).copy(), alpha))
    shard = write_shard(
        folder, "train-000000.tar", "train", [(key, found) for key, (_, found) in content.items()]
    )
    write_manifest(folder, dataclasses.replace(read_manifest(folder), shards=(shard,)))
    assert main(["validate", "--shards", str(folder)]) == 1
    out = capsys.readouterr().out
    assert "train-000000.tar: sample 'c': " in out
    assert message in out
    assert "3 objects in 1 shard: 1 problem\n" in out


def test_a_map_of_a_missing_view_raises_an_error(sample):
    more = dataclasses.replace(
        sample, extras=sample.extras | {"depth_004.png": sample.extras["depth_000.png"]}
    )
    with pytest.raises(SampleError, match=r"found 5 \(depth_004\.png is unexpected\)"):
        check_geometry(more)


def test_inspect_counts_objects_with_maps(folder, capsys):
    assert main(["inspect", "--shards", str(folder)]) == 0
    assert "objects with geometry          2 / 2 / 0" in capsys.readouterr().out


def test_training_reads_only_the_cameras_and_the_selected_views(folder):
    class Counting(ShardSource):
        def read(self, shard, spans):
            read.extend(size for _, size in spans)
            return super().read(shard, spans)

    read = []
    (shard,) = read_manifest(folder).shards
    sample = ShardReader([Entry(Counting(str(folder)), shard, 0)]).read(SampleLocation(0, 0, 2), [1])
    content = members(folder)["c"][1]
    # Adjacent members are read together, with headers and padding.
    needed = [["c2w.npy"], ["fxfycxcy.npy", "json"], ["view_001.webp"]]
    assert read == [sum(512 + -(-len(content[name]) // 512) * 512 for name in names) for names in needed]
    assert sample.views == (b"", content["view_001.webp"], b"", b"")
    assert sample.extras == {}


def test_surface_points_are_uniform_and_have_the_normals_of_the_triangles():
    # Two triangles in the plane z = 0 with areas 1/2 and 3, and a triangle with zero area.
    vertices = np.array([(0, 0, 0), (1, 0, 0), (0, 1, 0), (4, 0, 0), (2, 2, 0)], dtype=np.float64)
    faces = np.array([(0, 1, 2), (0, 1, 0), (1, 4, 3)], dtype=np.int32)
    points, normals = sample_surface([(vertices, faces)], 40_000, np.random.default_rng(0))
    left = points[:, 0] + points[:, 1] < 1
    assert abs(left.mean() - 0.5 / 3.5) < 0.01
    np.testing.assert_array_equal(normals, np.where(left[:, None], (0, 0, 1), (0, 0, -1)))
    # The mean of the points is the centroid. A corner with half the side lengths contains a quarter of the points.
    np.testing.assert_allclose(points[left].mean(axis=0), (1 / 3, 1 / 3, 0), atol=0.01)
    assert abs((points[left][:, :2].sum(axis=1) < 0.5).mean() - 0.25) < 0.02
    with pytest.raises(InputError, match="expected a surface, but found triangles with a total area of zero"):
        sample_surface([(vertices, faces[1:2])], 10, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda record: record * 1.01, "expected the points of surface.npy within"),
        (lambda record: record * (1, 1, 1, 2, 2, 2), "expected normals of length 1"),
        (lambda record: record[:-1], "expected surface.npy of shape"),
        (lambda record: record + np.nan, "expected the points of surface.npy within"),
    ],
)
def test_an_invalid_surface_raises_an_error(spoil, message):
    normals = np.random.default_rng(0).normal(size=(SURFACE_POINTS, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    points = normals / np.abs(normals).max(axis=1, keepdims=True)
    encoded = encode_surface(points, normals)
    assert encode_surface(*decode_surface("a", encoded)) == encoded
    record = spoil(np.concatenate([points, normals], axis=1)).astype(np.float32)
    with pytest.raises(SampleError, match=message):
        decode_surface("a", encode_array(record))


def test_depth_along_the_ray_raises_an_error(sample):
    check_geometry(sample)
    extras = dict(sample.extras)
    x, y = np.meshgrid(*((np.arange(SIDE) + 0.5) / SIDE - 0.5,) * 2)
    for view in range(VIEWS):
        name = depth_member(view)
        stretch = np.sqrt(1 + (x**2 + y**2) / sample.fxfycxcy[view, 0] ** 2)
        extras[name] = encode_depth(decode_depth("a", name, extras[name]) * stretch * 1.1)
    with pytest.raises(SampleError, match="depth maps of one surface"):
        check_geometry(dataclasses.replace(sample, extras=extras))


def test_normals_that_face_away_raise_an_error(sample):
    name = normal_member(1)
    seen = decode_image("a", sample.views[1])[..., 3:] > 0
    extras = sample.extras | {name: encode_normals(np.where(seen, sample.c2w[1, :3, 2], 0.0))}
    with pytest.raises(SampleError, match=r"normals of normal_001\.png that face the camera, but found 100%"):
        check_geometry(dataclasses.replace(sample, extras=extras))
