"""Cameras against silhouettes: correct ones pass, wrong ones are refused, and where neither shows, that is said."""

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
    """Render masks: ``hit(origin, rays)`` says which rays meet the object."""
    rows, columns = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5, indexing="ij")
    alphas = []
    for pose, (fx, fy, cx, cy) in zip(c2w.astype(np.float64), fxfycxcy, strict=True):
        local = np.stack([(columns / SIDE - cx) / fx, (rows / SIDE - cy) / fy, np.ones_like(rows)], -1)
        alphas.append(np.where(hit(pose[:3, 3], local @ pose[:3, :3].T), 255, 0).astype(np.uint8))
    return alphas


def boxes(seed):
    """Return a union of three boxes that fits the unit sphere, as a function of rays."""
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
    silhouettes = make_silhouettes(alphas, precision.cells)
    return check_coherence(silhouettes, c2w, fxfycxcy, precision.tolerance)


def worst(*args):
    return check(*args).distances.max()


def far_apart(c2w):
    forward = c2w[:, :3, 2]
    return np.argwhere(np.triu(forward @ forward.T < np.cos(np.radians(30)), 1))


def test_a_ray_is_as_far_as_the_silhouette_that_it_misses():
    # Two cameras far away on -y and +x at one height: rows of one image are rows of the other.
    poses = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    poses[0, :3, :3] = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # right +x, down -z, forward +y
    poses[0, :3, 3] = (0, -1000, 0)
    poses[1, :3, :3] = np.array([[0, 0, -1], [1, 0, 0], [0, -1, 0]])  # right +y, down -z, forward -x
    poses[1, :3, 3] = (1000, 0, 0)
    zoom = np.tile(np.array([400, 400, 0.5, 0.5], np.float32), (2, 1))
    seen = np.zeros((SIDE, SIDE), dtype=np.uint8)
    seen[40:80, 30:90] = 254  # not a binary mask
    distance = make_silhouettes([seen, seen], SIDE).distance
    views = np.arange(2)

    def at_row(row):
        pixels = (np.array([[0.5, (row + 0.5) / SIDE]]),) * 2
        return ray_distances(Silhouettes(distance, pixels), poses, zoom, views, views)

    assert at_row(40) == pytest.approx([0, 0])
    assert at_row(79) == pytest.approx([0, 0])
    assert at_row(37) == pytest.approx([3, 3])
    assert at_row(84) == pytest.approx([5, 5])
    assert at_row(20) == pytest.approx([6, 6])  # the most that is measured


def test_the_distance_to_a_silhouette_is_euclidean():
    alpha = np.zeros((SIDE, SIDE), dtype=np.uint8)
    alpha[50, 60] = 1
    (distance,) = make_silhouettes([alpha], SIDE).distance
    assert distance[50, 60] == 0
    assert distance[53, 64] == 5
    assert distance[51, 61] == pytest.approx(2**0.5)
    assert distance[70, 60] == 6


@pytest.mark.parametrize("preset", ["frame", "lrm", "openlrm", "instantmesh"])
def test_correct_cameras_pass_and_at_most_one_swap_in_twenty_does(preset):
    passed, swaps, refused = 0, 0, []
    for seed in range(5):
        c2w, fxfycxcy = cameras(seed, preset=preset)
        alphas = view_alphas(c2w, fxfycxcy, boxes(seed))
        found = check(alphas, c2w, fxfycxcy)
        refused += [seed] if found.distances.max() > RENDERED.tolerance else []
        if found.undetectable:
            continue
        pairs = far_apart(c2w)
        for first, second in np.random.default_rng(seed).permutation(pairs)[:6]:
            swapped = c2w.copy()
            swapped[[first, second]] = c2w[[second, first]]
            swaps += 1
            passed += worst(alphas, swapped, fxfycxcy) <= RENDERED.tolerance
    assert not refused
    assert swaps >= 15
    assert passed <= 0.05 * swaps


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
def test_cameras_that_are_wrong_for_all_views_are_refused_or_said_to_be_undecided(change):
    for seed in range(3):
        c2w, fxfycxcy = cameras(seed)
        alphas = view_alphas(c2w, fxfycxcy, boxes(seed))
        given = check(alphas, c2w, fxfycxcy)
        assert given.distances.max() <= RENDERED.tolerance
        changed = change(c2w, fxfycxcy)
        assert given.undetectable or worst(alphas, *changed) > RENDERED.tolerance


def test_a_ball_fits_in_any_order_and_that_is_not_called_right():
    c2w, fxfycxcy = cameras(0)
    # One distance, so that nothing tells the views apart.
    c2w[:, :3, 3] *= 2.5 / np.linalg.norm(c2w[:, :3, 3], axis=1, keepdims=True)
    found = check(view_alphas(c2w, fxfycxcy, ball), c2w, fxfycxcy)
    assert found.distances.max() <= RENDERED.tolerance
    assert "swapped poses" in found.undetectable


def test_one_view_decides_nothing():
    c2w, fxfycxcy = cameras(0, views=1)
    found = check(view_alphas(c2w, fxfycxcy, boxes(0)), c2w, fxfycxcy)
    assert found.distances == pytest.approx([0])
    assert found.undetectable == ("swapped poses", "another focal length")


def test_masks_and_poses_of_a_video_may_be_a_little_off():
    c2w, fxfycxcy = cameras(3)
    alphas = view_alphas(c2w, fxfycxcy, boxes(3))
    rng = np.random.default_rng(0)
    shaken = c2w.copy()
    shaken[:, :3, 3] += rng.normal(0, 0.01, (len(c2w), 3)).astype(np.float32)
    loose = [np.roll(alpha, rng.integers(-1, 2, 2), (0, 1)) for alpha in alphas]
    assert worst(loose, shaken, fxfycxcy, FILMED) <= FILMED.tolerance
    assert worst(loose, shaken, fxfycxcy) > RENDERED.tolerance
