import math

import pytest
import torch

from lrm_pl.geometry.cameras import (
    camera_vector,
    canonicalize,
    look_at,
    orbit,
    resize_and_crop,
)

CANONICAL = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, -2], [0, -1, 0, 0], [0, 0, 0, 1]])


def test_a_camera_on_minus_y_looking_at_the_origin_is_the_canonical_camera():
    assert torch.allclose(look_at(torch.tensor([0.0, -2.0, 0.0])), CANONICAL)


def test_look_at_gives_the_hand_computed_pose_from_plus_x_above():
    # At (3, 0, 4): forward = -(3, 0, 4) / 5; right = forward x z = (0, 1, 0); down = forward x right = (0.8, 0, -0.6).
    expected = torch.tensor([[0, 0.8, -0.6, 3], [1, 0, 0, 0], [0, -0.6, -0.8, 4], [0, 0, 0, 1]])
    assert torch.allclose(look_at(torch.tensor([3.0, 0.0, 4.0])), expected, atol=1e-6)


def test_a_camera_directly_above_the_target_is_an_error():
    with pytest.raises(ValueError, match="directly above or directly below"):
        look_at(torch.tensor([0.0, 0.0, 2.0]))


def test_an_orbit_starts_on_minus_y_and_turns_towards_plus_x():
    poses = orbit(4, distance=2.0, elevation_deg=0.0)
    expected = torch.tensor([[0.0, -2, 0], [2, 0, 0], [0, 2, 0], [-2, 0, 0]])
    assert torch.allclose(poses[:, :3, 3], expected, atol=1e-6)


def test_the_canonical_input_camera_is_on_minus_y_at_the_same_distance():
    positions = torch.tensor([[1.0, 2.0, 2.0], [-1.0, 0.5, 0.2]])
    poses = canonicalize(look_at(positions))
    expected = CANONICAL.clone()
    expected[1, 3] = -3.0  # |(1, 2, 2)| = 3
    assert torch.allclose(poses[0], expected, atol=1e-6)


def test_canonicalization_preserves_projections():
    # A world point and its rotated image project to the same place in the old and the new cameras.
    poses = look_at(torch.tensor([[1.0, 2.0, 2.0], [-2.0, 0.5, 0.2], [0.3, -2.5, -1.0]]))
    turned = canonicalize(poses)
    point = torch.tensor([0.2, -0.4, 0.7, 1.0])
    before = torch.linalg.inv(poses) @ point
    rotation = turned[0, :3, :3] @ poses[0, :3, :3].T
    moved = torch.cat([rotation @ point[:3], torch.ones(1)])
    assert torch.allclose(torch.linalg.inv(turned) @ moved, before, atol=1e-5)
    assert math.isclose(torch.linalg.det(rotation).item(), 1.0, abs_tol=1e-5)


def test_canonicalization_only_rotates_about_the_origin():
    pose = look_at(torch.tensor([0.0, 2.0, 0.0]), target=(1.0, 0.0, 0.0))
    turned = canonicalize(pose[None])[0]
    assert torch.allclose(turned[:3, :3], CANONICAL[:3, :3], atol=1e-6)
    assert math.isclose(turned[:3, 3].norm().item(), 2.0, abs_tol=1e-6)


def test_intrinsics_of_a_crop():
    # A 100 x 200 image (H x W), f = 0.5 widths = 100 px, f = 1 height = 100 px, center (100, 50) px. The window of
    # 50 rows x 40 columns at row 10, column 60: fx = 100 / 40, fy = 100 / 50,
    # cx = (100 - 60) / 40, cy = (50 - 10) / 50.
    cropped = resize_and_crop(
        torch.tensor([0.5, 1.0, 0.5, 0.5]), (100, 200), torch.tensor([10.0, 60, 50, 40])
    )
    assert torch.allclose(cropped, torch.tensor([2.5, 2.0, 1.0, 0.8]))


def test_intrinsics_of_several_crops_equal_those_of_each_crop():
    cameras = torch.tensor([[0.5, 1.0, 0.5, 0.5], [0.7, 0.9, 0.4, 0.6]])
    windows = torch.tensor([[10.0, 60, 50, 40], [0.0, 8, 20, 30]])
    cropped = resize_and_crop(cameras, (100, 200), windows)
    # Second crop: fx = 0.7 * 200 / 30, fy = 0.9 * 100 / 20, cx = (80 - 8) / 30, cy = (60 - 0) / 20.
    assert torch.allclose(cropped, torch.tensor([[2.5, 2.0, 1.0, 0.8], [14 / 3, 4.5, 2.4, 3.0]]))


def test_the_order_of_elements_in_the_camera_vector():
    pose = torch.arange(16.0).view(4, 4)
    vector = camera_vector(pose, torch.tensor([16.0, 17.0, 18.0, 19.0]))
    assert vector.tolist() == list(range(20))


def test_cameras_stay_float32_and_exact_under_autocast():
    poses = look_at(torch.tensor([[1.0, 2.0, 2.0], [-2.0, 0.5, 0.2]]))
    expected = canonicalize(poses)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            turned = canonicalize(poses)
        assert turned.dtype == torch.float32
        assert torch.equal(turned, expected)
