"""Silhouette coherence test with correct, incorrect and ambiguous cameras."""

import numpy as np
import pytest

from data_tools.quality.silhouettes import (
    FILMED,
    RENDERED,
    Silhouettes,
    check_coherence,
    make_silhouettes,
    ray_distances,
)
from data_tools.rendering.cameras import PRESETS, draw_cameras

SIDE = 128


def view_alphas(c2w, fxfycxcy, hit):
    """Render masks of an object. ``hit(origin, rays)`` returns whether rays intersect the object."""
    rows, columns = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5, indexing="ij")
    alphas = []
    for pose, (fx, fy, cx, cy) in zip(c2w.astype(np.float64), fxfycxcy, strict=True):
        local = np.stack([(columns / SIDE - cx) / fx, (rows / SIDE - cy) / fy, np.ones_like(rows)], -1)
        alphas.append(np.where(hit(pose[:3, 3], local @ pose[:3, :3].T), 255, 0).astype(np.uint8))
    return alphas


def boxes(seed):
    """Return the function ``hit`` of a union of three boxes inside the unit sphere."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(3):
        half = rng.uniform(0.08, 0.35, 3)
        center = rng.uniform(-0.55, 0.55, 3)
        parts.append((center - half, center + half))

    def hit(origin, rays):
        hits = np.zeros(rays.shape[:-1], dtype=bool)
        for low, high in parts:
            ends = (np.stack([low, high]) - origin)[:, None, None] / rays
            hits |= ends.min(axis=0).max(axis=-1) <= ends.max(axis=0).min(axis=-1)
        return hits

    return hit


def ball(origin, rays):
    across = np.linalg.norm(np.cross(rays, origin), axis=-1) / np.linalg.norm(rays, axis=-1)
    return across < 0.9


def cameras(seed, views=12, preset="frame"):
    drawn = draw_cameras(PRESETS[preset], views, np.random.default_rng(seed))
    return drawn.c2w, drawn.fxfycxcy


def check(alphas, c2w, fxfycxcy, precision=RENDERED):
    return check_coherence(make_silhouettes(alphas, precision), c2w, fxfycxcy)


def worst(*args):
    return check(*args).distances.max()


def far_apart(c2w):
    forward = c2w[:, :3, 2]
    return np.argwhere(np.triu(forward @ forward.T < np.cos(np.radians(30)), 1))


def test_the_distance_of_a_ray_is_the_distance_to_the_silhouettes():
    # Two distant cameras on the axes -y and +x at the same height, so that the rows of the images correspond.
    poses = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    poses[0, :3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # right +x, down -z, forward +y
    poses[0, :3, 3] = (0, -1000, 0)
    poses[1, :3, :3] = np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]])  # right +y, down -z, forward -x
    poses[1, :3, 3] = (1000, 0, 0)
    zoom = np.tile(np.array([400, 400, 0.5, 0.5], np.float32), (2, 1))
    seen = np.zeros((SIDE, SIDE), dtype=np.uint8)
    seen[40:80, 30:90] = 254  # not a binary mask
    distance = make_silhouettes([seen, seen], RENDERED).distance
    views = np.arange(2)

    def at_row(row):
        pixels = (np.array([[0.5, (row + 0.5) / SIDE]]),) * 2
        return ray_distances(Silhouettes(distance, pixels, RENDERED.tolerance), poses, zoom, views, views)

    assert at_row(40) == pytest.approx([0, 0])
    assert at_row(79) == pytest.approx([0, 0])
    assert at_row(37) == pytest.approx([3, 3])
    assert at_row(84) == pytest.approx([5, 5])
    assert at_row(20) == pytest.approx([6, 6])  # the maximum distance


def test_the_distance_to_a_silhouette_is_euclidean():
    alpha = np.zeros((SIDE, SIDE), dtype=np.uint8)
    alpha[50, 60] = 1
    (distance,) = make_silhouettes([alpha], RENDERED).distance
    assert distance[50, 60] == 0
    assert distance[53, 64] == 5
    assert distance[51, 61] == pytest.approx(2**0.5)
    assert distance[70, 60] == 6


@pytest.mark.parametrize(
    "preset", ["frame", *(pytest.param(n, marks=pytest.mark.soak) for n in ("lrm", "openlrm", "instantmesh"))]
)
def test_correct_cameras_pass_and_swapped_poses_are_detected(preset):
    passed, swaps = 0, 0
    for seed in range(5):
        c2w, fxfycxcy = cameras(seed, preset=preset)
        silhouettes = make_silhouettes(view_alphas(c2w, fxfycxcy, boxes(seed)), RENDERED)
        found = check_coherence(silhouettes, c2w, fxfycxcy)
        assert found.distances.max() <= RENDERED.tolerance
        if found.undetectable:
            continue
        for first, second in np.random.default_rng(seed).permutation(far_apart(c2w))[:6]:
            swapped = c2w.copy()
            swapped[[first, second]] = c2w[[second, first]]
            swaps += 1
            distances = check_coherence(silhouettes, swapped, fxfycxcy).distances
            passed += distances.max() <= RENDERED.tolerance
    assert swaps >= 15
    assert passed <= 0.05 * swaps


@pytest.fixture(scope="module")
def checked():
    """Cameras and silhouettes of three objects, and the camera errors that the silhouettes do not reveal."""
    objects = []
    for seed in range(3):
        c2w, fxfycxcy = cameras(seed)
        silhouettes = make_silhouettes(view_alphas(c2w, fxfycxcy, boxes(seed)), RENDERED)
        found = check_coherence(silhouettes, c2w, fxfycxcy)
        assert found.distances.max() <= RENDERED.tolerance
        objects.append((silhouettes, c2w, fxfycxcy, found.undetectable))
    return objects


@pytest.mark.parametrize(
    "change",
    [
        lambda c2w, k: (np.roll(c2w, 1, axis=0), k),
        lambda c2w, k: (c2w[::-1].copy(), k),
        lambda c2w, k: (c2w @ np.diag([-1, 1, 1, 1]).astype(np.float32), k),  # images mirrored
        lambda c2w, k: (c2w @ np.diag([1, -1, -1, 1]).astype(np.float32), k),  # OpenGL's axes
        lambda c2w, k: (np.linalg.inv(c2w), k),  # world to camera
        lambda c2w, k: (c2w, k * np.float32([1.3, 1.3, 1, 1])),
        lambda c2w, k: (c2w, k * np.float32([0.7, 0.7, 1, 1])),
        lambda c2w, k: (c2w, k + np.float32([0, 0, 0.05, 0])),  # principal point moved
    ],
    ids="shifted reversed mirrored opengl inverse longer shorter off-center".split(),
)
def test_systematic_camera_errors_are_detected_or_reported_as_undetectable(checked, change):
    for silhouettes, c2w, fxfycxcy, undetectable in checked:
        if not undetectable:
            distances = check_coherence(silhouettes, *change(c2w, fxfycxcy)).distances
            assert distances.max() > RENDERED.tolerance


def test_swapped_poses_are_undetectable_for_a_sphere():
    c2w, fxfycxcy = cameras(0)
    # All cameras have the same distance, so that the views are identical.
    c2w[:, :3, 3] *= 2.5 / np.linalg.norm(c2w[:, :3, 3], axis=1, keepdims=True)
    found = check(view_alphas(c2w, fxfycxcy, ball), c2w, fxfycxcy)
    assert found.distances.max() <= RENDERED.tolerance
    assert "swapped poses" in found.undetectable


def test_errors_are_undetectable_with_one_view():
    c2w, fxfycxcy = cameras(0, views=1)
    found = check(view_alphas(c2w, fxfycxcy, boxes(0)), c2w, fxfycxcy)
    assert found.distances == pytest.approx([0])
    assert found.undetectable == ("swapped poses", "another focal length")


def test_the_tolerance_for_videos_accepts_inaccurate_masks_and_poses():
    c2w, fxfycxcy = cameras(3)
    alphas = view_alphas(c2w, fxfycxcy, boxes(3))
    rng = np.random.default_rng(0)
    shaken = c2w.copy()
    shaken[:, :3, 3] += rng.normal(0, 0.01, (len(c2w), 3)).astype(np.float32)
    loose = [np.roll(alpha, rng.integers(-1, 2, 2), (0, 1)) for alpha in alphas]
    assert worst(loose, shaken, fxfycxcy, FILMED) <= FILMED.tolerance
    assert worst(loose, shaken, fxfycxcy) > RENDERED.tolerance
