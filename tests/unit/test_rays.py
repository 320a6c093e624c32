import math

import pytest
import torch

from lrm_pl.geometry.cameras import look_at, resize_and_crop
from lrm_pl.geometry.rays import pixel_rays, ray_interval

POSE = look_at(torch.tensor([0.0, -2.0, 0.0]))


def test_rays_pass_through_pixel_centers():
    # Two rows, four columns, f = 1 in both: pixel (0, 3) is at u = 3.5 / 4, v = 0.5 / 2, so its camera ray is
    # (0.375, -0.25, 1); in the world of the canonical camera x = right, z = -down, y = forward.
    origins, directions = pixel_rays(POSE, torch.tensor([1.0, 1.0, 0.5, 0.5]), height=2, width=4)
    expected = torch.tensor([0.375, 1.0, 0.25])
    assert torch.allclose(directions[0, 3], expected / expected.norm())
    assert torch.equal(origins[1, 2], torch.tensor([0.0, -2.0, 0.0]))


def test_rays_of_a_crop_equal_the_rays_of_the_full_image():
    camera = torch.tensor([1.2, 1.2, 0.5, 0.5])
    _, whole = pixel_rays(POSE, camera, 64, 64)
    _, part = pixel_rays(POSE, resize_and_crop(camera, (64, 64), torch.tensor([7.0, 30, 16, 20])), 16, 20)
    assert torch.allclose(part, whole[7:23, 30:50], atol=1e-6)


def test_the_interval_of_rays_in_the_sphere():
    # Toward the center: from 1 to 3. Parallel at height 0.6: half chord 0.8. At height 1.5: no hit.
    origins = torch.tensor([[0.0, -2, 0], [0.0, -2, 0.6], [0.0, -2, 1.5]])
    directions = torch.tensor([[0.0, 1, 0]]).expand(3, 3)
    near, far = ray_interval(origins, directions, "sphere")
    assert torch.allclose(near[:2], torch.tensor([1.0, 1.2]), atol=1e-6)
    assert torch.allclose(far[:2], torch.tensor([3.0, 2.8]), atol=1e-6)
    assert near[2] == far[2]


def test_the_interval_of_rays_in_the_box():
    diagonal = 1 / math.sqrt(2)
    origins = torch.tensor([[0.0, -3, 0], [-2.0, -2, 0], [0.0, -3, 1.2], [0.0, -3, 1.0]])
    directions = torch.tensor([[0.0, 1, 0], [diagonal, diagonal, 0], [0.0, 1, 0], [0.0, 1, 0]])
    near, far = ray_interval(origins, directions, "box")
    assert torch.allclose(near[:2], torch.tensor([2.0, math.sqrt(2)]))
    assert torch.allclose(far[:2], torch.tensor([4.0, 3 * math.sqrt(2)]))
    assert near[2] == far[2], "a parallel ray outside misses"
    assert (near[3].item(), far[3].item()) == (2.0, 4.0), "a ray inside a face is not NaN"


@pytest.mark.parametrize("bounds", ["sphere", "box"])
def test_bounds_behind_the_camera_are_missed(bounds):
    near, far = ray_interval(torch.tensor([[0.0, -3, 0]]), torch.tensor([[0.0, -1, 0]]), bounds)
    assert near.item() == far.item()
    near, far = ray_interval(torch.tensor([[0.0, 0.5, 0]]), torch.tensor([[0.0, 1, 0]]), bounds)
    assert near.item() == 0
    assert math.isclose(far.item(), 0.5, abs_tol=1e-6)


def test_rays_stay_float32_and_exact_under_autocast():
    camera = torch.tensor([1.2, 1.2, 0.5, 0.5])
    expected = pixel_rays(POSE, camera, 8, 8)[1]
    with torch.autocast("cpu", torch.bfloat16):
        directions = pixel_rays(POSE, camera, 8, 8)[1]
        near, _ = ray_interval(*pixel_rays(POSE, camera, 8, 8), "sphere")
    assert directions.dtype == near.dtype == torch.float32
    assert torch.equal(directions, expected)
