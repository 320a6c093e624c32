"""Depth, normals and surface points of rendered shards against closed-form meshes, per pixel."""

import itertools
import json

import numpy as np
import pytest

from data_tools.quality.geometry import back_project
from data_tools.quality.validate import validate
from data_tools.shards.repack import repack
from lrm_pl.data.geometry_views import decode_depth, decode_normals, depth_member, normal_member
from lrm_pl.data.manifest import Manifest, write_manifest
from lrm_pl.data.schema import SURFACE_MEMBER, decode_image, decode_sample
from lrm_pl.data.surface import SURFACE_POINTS, decode_surface
from lrm_pl.data.tar import write_shard
from tests.builders import box, members, write_gltf
from tests.data_tools.blender_renders import render_results

pytestmark = pytest.mark.blender

SIDE, VIEWS = 64, 4
SETTINGS = {"views": VIEWS, "resolution": SIDE, "samples": 4}

#: A step of 16 bits of depth; rounding is off by half of it.
STEP = 8 / 65535

#: The cube is turned about z, then about x, so that no face looks along an axis.
TURN = np.radians((25, 35))


def turned():
    (cz, cx), (sz, sx) = np.cos(TURN), np.sin(TURN)
    about_z = np.array([(cz, -sz, 0), (sz, cz, 0), (0, 0, 1)])
    return np.array([(1, 0, 0), (0, cx, -sx), (0, sx, cx)]) @ about_z


def sphere(rings=256, segments=512):
    """Return a sphere whose faces deviate from the unit sphere by at most 4e-5."""
    polar, azimuth = np.meshgrid(
        np.pi * np.arange(rings + 1) / rings, 2 * np.pi * np.arange(segments) / segments, indexing="ij"
    )
    points = np.stack(
        [np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.cos(polar)], axis=-1
    )
    row, column = np.mgrid[:rings, :segments]
    a, b = row * segments + column, row * segments + (column + 1) % segments
    quads = np.stack([a, a + segments, b + segments, b], axis=-1).reshape(-1, 4)
    return points.reshape(-1, 3), np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geometry")
    ball, faces = sphere()
    # away from the origin and large: normalizing must bring it back
    write_gltf(folder / "ball.gltf", [(ball * 3 + (1, 2, 3), faces, (0.5, 0.5, 0.5), 1.0)])
    corners, faces = box((0, 0, 0), (1, 1, 1))
    cube = corners @ turned().T
    write_gltf(folder / "cube.gltf", [(5 * cube + (7, -3, 2), faces, (0.9, 0.2, 0.2), 1.0)])
    # as the cube, of faces that look inwards
    write_gltf(folder / "inward.gltf", [(cube, faces[:, ::-1], (0.9, 0.2, 0.2), 1.0)])
    # as the cube, mirrored in the file and mirrored back by its node
    write_gltf(folder / "mirrored.gltf", [(cube * (-1, 1, 1), faces[:, ::-1], (0.9, 0.2, 0.2), 1.0)])
    record = json.loads((folder / "mirrored.gltf").read_text())
    record["nodes"][0]["scale"] = [-1, 1, 1]
    (folder / "mirrored.gltf").write_text(json.dumps(record))
    # as the cube, of glass with something inside; and in glass of no color at all
    for name, alpha in (("glass", 0.3), ("clear", 0.0)):
        core, shell = (cube * 0.5, faces, (0.2, 0.2, 0.9), 1.0), (cube, faces, (0.9, 0.2, 0.2), alpha)
        write_gltf(folder / f"{name}.gltf", [core, shell])
    return folder


@pytest.fixture(scope="module")
def rendered(assets):
    """The members of each object with depth, normals and surface points."""
    results = render_results(assets, depth=True, normals=True, surface=True, **SETTINGS)
    return {key: result.members for key, result in results.items()}


@pytest.fixture(scope="module")
def samples(rendered):
    return {key: decode_sample(key, content) for key, content in rendered.items()}


def geometry(sample, view):
    names = depth_member(view), normal_member(view)
    alpha = decode_image("", sample.views[view])[..., 3]
    depth = decode_depth("", names[0], sample.extras[names[0]])
    return alpha, depth, decode_normals("", names[1], sample.extras[names[1]])


def rays(sample, view):
    """Return origin (3,) and directions (SIDE, SIDE, 3) of the pixels' centers; of length 1 along the camera's z."""
    c2w, camera = sample.c2w[view].astype(np.float64), sample.fxfycxcy[view].astype(np.float64)
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    directions = np.stack(
        [(x - camera[2]) / camera[0], (y - camera[3]) / camera[1], np.ones_like(x)], axis=-1
    )
    return c2w[:3, 3], directions @ c2w[:3, :3].T


def meet_sphere(origin, directions):
    """Depth of the unit sphere (0 for rays that miss it) and normals."""
    a, b, c = (directions**2).sum(-1), directions @ origin, origin @ origin - 1
    root = b * b - a * c
    depth = np.where(root > 0, (-b - np.sqrt(root.clip(0))) / a, 0)
    return depth, np.where(root[..., None] > 0, origin + depth[..., None] * directions, 0)


def meet_cube(origin, directions, half):
    """Depth of the rotated cube (0 for rays that miss it) and normals."""
    o, d = origin @ turned(), directions @ turned()
    near, far = np.sort(np.stack([(-half - o) / d, (half - o) / d]), axis=0)
    first, last = near.max(-1), far.min(-1)
    face = np.eye(3)[near.argmax(-1)] * -np.sign(d)
    hit = first < last
    return np.where(hit, first, 0), np.where(hit[..., None], face @ turned().T, 0)


def expected(key, sample, view):
    origin, directions = rays(sample, view)
    if key == "ball":
        return meet_sphere(origin, directions)
    return meet_cube(origin, directions, 1 / np.sqrt(3))


def angle_deg(a, b):
    return np.degrees(np.arccos((a * b).sum(-1).clip(-1, 1)))


KEYS = ("ball", "cube", "inward", "mirrored", "glass", "clear")


@pytest.mark.parametrize("key", KEYS)
def test_depth_is_the_distance_along_z_of_the_first_surface_at_the_pixel_center(samples, key):
    for view in range(VIEWS):
        alpha, depth, _ = geometry(samples[key], view)
        right, face = expected(key, samples[key], view)
        assert ((depth > 0) != (right > 0)).sum() <= 2, "a ray along the edge may go either way"
        both = (depth > 0) & (right > 0)
        assert both.sum() > 250
        # how far from the surface: seen at a grazing angle, it is far away in depth soon
        _, directions = rays(samples[key], view)
        assert np.abs((depth - right) * (directions * face).sum(-1))[both].max() < STEP
        assert not depth[alpha == 0].any()
        assert (depth[alpha == 255] > 0).all()


@pytest.mark.parametrize("key", KEYS)
def test_normals_are_in_world_coordinates_and_point_toward_the_camera(samples, key):
    for view in range(VIEWS):
        _, depth, normals = geometry(samples[key], view)
        _, right = expected(key, samples[key], view)
        assert ((normals != 0).any(-1) == (depth > 0)).all()
        _, directions = rays(samples[key], view)
        inner = (depth > 0) & ((right * directions).sum(-1) < -0.5)
        for shift in itertools.product((-1, 0, 1), repeat=2):  # a pixel that shows two faces has their mean
            inner &= (np.roll(right, shift, (0, 1)) * right).sum(-1) > 0.9
        assert inner.sum() > 90
        # the mean over a pixel of the ball, of 1.3 degrees and more, is not that of its center
        assert angle_deg(normals, right)[inner].max() < (2.5 if key == "ball" else 0.5)


def test_back_projected_depth_lies_on_the_surface(samples):
    half = 1 / np.sqrt(3)
    for view in range(VIEWS):
        sample = samples["ball"]
        points = back_project(geometry(sample, view)[1], sample.c2w[view], sample.fxfycxcy[view])
        assert len(points) > 1000
        assert np.abs(np.linalg.norm(points, axis=1) - 1).max() < STEP
        sample = samples["cube"]
        points = back_project(geometry(sample, view)[1], sample.c2w[view], sample.fxfycxcy[view])
        assert np.abs(np.abs(points @ turned()).max(axis=1) - half).max() < STEP


def test_surface_points_are_uniformly_distributed_on_the_surface(samples):
    points, normals = decode_surface("", samples["ball"].extras[SURFACE_MEMBER])
    assert len(points) == SURFACE_POINTS
    assert np.abs(np.linalg.norm(points, axis=1) - 1).max() < 1e-4
    assert (points * normals).sum(axis=1).min() > 0.999
    assert np.abs(points.mean(axis=0)).max() < 5 / np.sqrt(3 * SURFACE_POINTS)
    for key, side in (("cube", 1), ("inward", -1), ("mirrored", 1)):
        points, normals = decode_surface("", samples[key].extras[SURFACE_MEMBER])
        local = points @ turned() * np.sqrt(3)
        assert np.abs(np.abs(local).max(axis=1) - 1).max() < 1e-5
        face = np.abs(local).argmax(axis=1)
        np.testing.assert_allclose(normals @ turned(), side * np.eye(3)[face] * np.sign(local), atol=1e-5)
        count = np.bincount(2 * face + (local[np.arange(len(face)), face] > 0), minlength=6)
        assert np.abs(count - SURFACE_POINTS / 6).max() < 5 * np.sqrt(SURFACE_POINTS / 6)


@pytest.mark.parametrize("normals", [False, True])
def test_views_do_not_depend_on_the_geometry_options(assets, rendered, normals):
    names = {normal_member(view) for view in range(VIEWS)} if normals else set()
    depths = {depth_member(view) for view in range(VIEWS)}
    fewer = render_results(assets, ("cube", "glass"), normals=normals, **SETTINGS)
    for key, result in fewer.items():
        assert names <= result.members.keys()
        assert (rendered[key].keys() - result.members.keys()) >= depths | {SURFACE_MEMBER}
        assert {name: rendered[key][name] for name in result.members} == result.members


def test_rendered_shards_are_valid_in_full_and_half_resolution(rendered, samples, tmp_path):
    (full := tmp_path / "full").mkdir()
    shard = write_shard(full, "train-000000.tar", "train", sorted(rendered.items()))
    write_manifest(full, Manifest((shard,), VIEWS, 0, {"resolution": SIDE}))
    assert validate(full) == 0
    repack([full], tmp_path / "small", resolution=SIDE // 2)
    assert validate(tmp_path / "small") == 0
    for key in ("ball", "cube"):
        small = decode_sample(key, members(tmp_path / "small")[key][1])
        for view in range(VIEWS):
            alpha, depth, _ = geometry(small, view)
            _, large, _ = geometry(samples[key], view)
            assert depth.shape == (SIDE // 2, SIDE // 2)
            np.testing.assert_array_equal(depth, np.where(alpha > 0, large[1::2, 1::2], 0))
            # of a quarter of a pixel to the right and down: no point is further from the surface than that
            away = np.sqrt(2) / 4 * depth[depth > 0] / (small.fxfycxcy[view, 0] * SIDE / 2)
            points = back_project(depth, small.c2w[view], small.fxfycxcy[view])
            found = np.linalg.norm(points, axis=1) if key == "ball" else np.abs(points @ turned()).max(axis=1)
            assert len(points) > 150
            assert (np.abs(found - (1 if key == "ball" else 1 / np.sqrt(3))) < away + STEP).all()
