"""Camera presets and sampling of cameras."""

import math

import numpy as np
import pytest

from data_tools.__main__ import _parser, _settings
from data_tools.quality.measures import CROPPED_RULE
from data_tools.rendering.cameras import (
    PRESETS,
    camera_positions,
    derive_seed,
    draw_cameras,
    focal_from_fov,
    frame_rectangle,
    look_at_origin,
)
from lrm_pl.conventions import rigid_error


def draw(preset="frame", views=16, seed=0):
    return draw_cameras(PRESETS[preset], views, np.random.default_rng(seed))


def test_a_camera_on_the_negative_y_axis_is_the_canonical_camera():
    expected = [[1, 0, 0, 0], [0, 0, 1, -2], [0, -1, 0, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(look_at_origin(np.array([0.0, -2.0, 0.0])), expected, atol=1e-12)


def test_a_camera_above_the_x_axis_looks_down_at_the_origin():
    c2w = look_at_origin(np.array([3.0, 0.0, 4.0]))
    np.testing.assert_allclose(c2w[:3, 0], [0, 1, 0], atol=1e-12)  # right
    np.testing.assert_allclose(
        c2w[:3, 1], [0.8, 0, -0.6], atol=1e-12
    )  # down, orthogonal to the viewing direction
    np.testing.assert_allclose(c2w[:3, 2], [-0.6, 0, -0.8], atol=1e-12)  # forward


def test_camera_positions_match_known_values():
    found = camera_positions(np.array([5.0, 5.0]), np.array([3.0, 4.0]), np.array([0.0, math.pi / 2]))
    np.testing.assert_allclose(found, [[4, 0, 3], [0, 3, 4]], atol=1e-12)


def test_the_height_is_clipped_to_a_fraction_of_the_radius():
    found = camera_positions(np.array([1.0]), np.array([1.6]), np.array([0.0]))
    np.testing.assert_allclose(found, [[math.sqrt(1 - 0.95**2), 0, 0.95]], atol=1e-12)


def test_focal_lengths_match_known_fields_of_view():
    # 90 degrees: 0.5 / tan 45; lens 24 on sensor 32: 24 / 32
    np.testing.assert_allclose(focal_from_fov(np.array([90.0])), 0.5)
    np.testing.assert_allclose(focal_from_fov(np.array([67.38])), 0.75, atol=1e-5)
    np.testing.assert_allclose(draw("frame").fxfycxcy[0], [1.0722535, 1.0722535, 0.5, 0.5], atol=1e-6)


DRAWN = sorted(name for name, preset in PRESETS.items() if not preset.orbit)


@pytest.mark.parametrize("preset", DRAWN)
def test_sampled_cameras_are_in_the_ranges_and_look_at_the_origin(preset):
    ranges, cameras = PRESETS[preset], draw(preset, views=200)
    positions = cameras.c2w[:, :3, 3].astype(np.float64)
    radius, height = np.linalg.norm(positions, axis=1), positions[:, 2]
    assert cameras.c2w.dtype == cameras.fxfycxcy.dtype == np.float32
    for drawn, (low, high) in ((radius, ranges.radius_range), (height, ranges.height_range)):
        assert low - 1e-5 <= drawn.min() < drawn.max() <= high + 1e-5
    assert rigid_error(cameras.c2w) < 1e-6
    np.testing.assert_allclose(cameras.c2w[:, :3, 2], -positions / radius[:, None], atol=1e-6)
    assert (cameras.c2w[:, 2, 1] < 0).all()  # down in the image is down in the world
    assert (np.abs(cameras.c2w[:, 2, 0]) < 1e-6).all()  # and the horizon is level


def test_each_sector_of_the_circle_contains_one_view():
    positions = draw(views=16).c2w[:, :3, 3]
    azimuth = np.arctan2(positions[:, 1], positions[:, 0]) % (2 * math.pi)
    sectors = np.floor(azimuth / (2 * math.pi) * 16).astype(int)
    assert sorted(sectors) == list(range(16))
    assert list(sectors) != sorted(sectors)  # the order is random


def test_the_unit_sphere_is_inside_the_image_with_the_default_preset():
    frame = PRESETS["frame"]
    half_sphere_deg = math.degrees(math.asin(1 / frame.radius_range[0]))
    assert half_sphere_deg < frame.fov_range_deg[0] / 2


def test_the_rectangle_of_a_box_contains_the_near_face():
    c2w = look_at_origin(np.array([0.0, -3.0, 0.0])).astype(np.float32)
    # The near face has distance 2. It extends 0.5 * 1 / 2 (x) and 0.25 * 1 / 2 (z) image sides from the center.
    found = frame_rectangle(c2w, 1.0, np.array([0.5, 1.0, 0.25]), margin=0.01)
    np.testing.assert_allclose(found, [0.24, 0.365, 0.76, 0.635], atol=1e-6)
    assert frame_rectangle(c2w, 1.0, np.array([9.0, 1.0, 0.0]), margin=0.0)[::2] == (0, 1)  # clipped
    around_camera = np.array([0.1, 3.5, 0.1])
    assert frame_rectangle(c2w, 1.0, around_camera, margin=0.0) == (0, 0, 1, 1)


def test_seeds_are_determined_by_the_arguments():
    assert derive_seed(0, "chair") == 0x500BA265  # the first 31 bits of sha256 of "0/chair"
    assert len({derive_seed(s, k, v) for s in (0, 1) for k in ("a", "b") for v in range(9)}) == 36
    np.testing.assert_array_equal(draw(seed=5).c2w, draw(seed=5).c2w)
    assert not np.array_equal(draw(seed=5).c2w, draw(seed=6).c2w)


def test_an_orbit_has_24_fixed_views_that_begin_with_the_front_view():
    cameras = draw("gso-orbit", views=24)
    positions = cameras.c2w[:, :3, 3].astype(np.float64)
    np.testing.assert_allclose(positions[0], (0, -2.5, 0), atol=1e-6)
    # The third view is rotated by 90 degrees, counterclockwise as seen from above.
    np.testing.assert_allclose(positions[2], (2.5, 0, 0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(positions, axis=1), 2.5, atol=1e-6)
    polar_deg = np.degrees(np.arccos(positions[:, 2] / 2.5))
    np.testing.assert_allclose(polar_deg, np.repeat((90, 60, 120), 8), atol=1e-4)
    azimuth_deg = np.degrees(np.arctan2(positions[:, 1], positions[:, 0])) + 90
    np.testing.assert_allclose(azimuth_deg % 360, np.tile(np.arange(0, 360, 45), 3), atol=1e-4)
    np.testing.assert_array_equal(cameras.c2w, draw("gso-orbit", views=24, seed=5).c2w)
    np.testing.assert_allclose(cameras.c2w[:, :3, 2], -positions / 2.5, atol=1e-6)


def test_presets_that_crop_objects_do_not_have_the_rule_about_cropping():
    whole = {name for name, preset in PRESETS.items() if preset.shows_whole(preset.normalize)}
    assert whole == {"frame", "gso-orbit"}
    assert not PRESETS["frame"].shows_whole("cube")
    for name in PRESETS:
        args = _parser().parse_args(["render", "--preset", name])
        assert (CROPPED_RULE in _settings(args)[0].rules) == (name in whole)
