import math

import pytest
import torch

from lrm_pl.rendering.compositing import composite
from lrm_pl.rendering.ray_marching import RayMarching, march_rays
from lrm_pl.rendering.sampling import blur_weights, sample_importance, sample_stratified


def test_a_box_of_constant_density_has_the_closed_form_opacity_and_color():
    near, far, sigma = torch.tensor([1.0]), torch.tensor([2.5]), 0.8
    color = torch.tensor([0.2, 0.5, 0.9])
    for samples in (1, 7, 64):
        t, delta = sample_stratified(near, far, samples, None)
        pixels = composite(torch.full((1, samples), sigma), color.expand(1, samples, 3), t, delta[..., None])
        opacity = 1 - math.exp(-sigma * 1.5)
        assert math.isclose(pixels.opacity.item(), opacity, rel_tol=1e-5)
        assert torch.allclose(pixels.rgb[0], opacity * color, rtol=1e-5)


def test_depth_of_a_constant_density_converges_to_the_closed_form():
    # E[t] = integral of t sigma exp(-sigma (t - near)) / opacity = near + 1 / sigma - L exp(-sigma L) / opacity.
    near, far, sigma, length = 1.0, 3.0, 1.5, 2.0
    t, delta = sample_stratified(torch.tensor([near]), torch.tensor([far]), 512, None)
    pixels = composite(torch.full((1, 512), sigma), torch.zeros(1, 512, 3), t, delta[..., None])
    opacity = 1 - math.exp(-sigma * length)
    expected = near + 1 / sigma - length * math.exp(-sigma * length) / opacity
    assert math.isclose(pixels.depth.item(), expected, rel_tol=1e-4)


def test_two_samples_by_hand():
    # Bins of 0.5: sigma = 2 then 4, so alpha = 1 - e^-1 and 1 - e^-2; the second is seen through e^-1.
    sigma, rgb = torch.tensor([[2.0, 4.0]]), torch.tensor([[[1.0, 0, 0], [0.0, 1, 0]]])
    pixels = composite(sigma, rgb, torch.tensor([[1.25, 1.75]]), torch.tensor([[0.5]]))
    first, second = 1 - math.exp(-1), math.exp(-1) * (1 - math.exp(-2))
    assert torch.allclose(pixels.rgb[0], torch.tensor([first, second, 0.0]))
    assert math.isclose(pixels.opacity.item(), first + second, rel_tol=1e-6)
    assert math.isclose(pixels.depth.item(), (1.25 * first + 1.75 * second) / (first + second), rel_tol=1e-6)


def test_compositing_over_a_background():
    pixels = composite(
        torch.tensor([[2.0]]), torch.zeros(1, 1, 3), torch.tensor([[1.0]]), torch.tensor([[0.5]])
    )
    assert torch.allclose(
        pixels.over(torch.tensor([1.0, 0.5, 0.0]))[0], math.exp(-1) * torch.tensor([1, 0.5, 0])
    )


def test_large_densities_have_finite_values_and_gradients():
    sigma = torch.tensor([[0.0, 1e4, 6e4]], requires_grad=True)
    pixels = composite(sigma, torch.ones(1, 3, 3), torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0]]))
    (pixels.rgb.sum() + pixels.depth.sum()).backward()
    assert pixels.opacity.item() == 1
    assert sigma.grad.isfinite().all()


def test_jittered_samples_remain_in_their_bins():
    near, far = torch.tensor([1.0]), torch.tensor([3.0])
    low, width = sample_stratified(near, far, 4, torch.tensor([0.0]))
    high, _ = sample_stratified(near, far, 4, torch.tensor([0.999]))
    assert width.item() == 0.5
    assert torch.allclose(low[0], torch.tensor([1.0, 1.5, 2.0, 2.5]))
    assert torch.allclose(high[0], torch.tensor([1.4995, 1.9995, 2.4995, 2.9995]))


def test_compositing_is_float32_under_autocast():
    sigma, rgb = torch.rand(5, 16), torch.rand(5, 16, 3)
    t, delta = sample_stratified(torch.ones(5), 3 * torch.ones(5), 16, None)
    expected = composite(sigma, rgb, t, delta[..., None])
    with torch.autocast("cpu", torch.bfloat16):
        pixels = composite(sigma, rgb, t, delta[..., None])
    assert pixels.rgb.dtype == pixels.opacity.dtype == pixels.depth.dtype == torch.float32
    assert torch.equal(pixels.rgb, expected.rgb)


def test_positions_of_importance_samples():
    # Weight 1 on [1, 2] and 3 on [2, 4]: a quarter of the samples evenly over the first, the rest over the second.
    edges, weights = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, 3.0]])
    t = sample_importance(edges, weights, 8, torch.tensor([0.5]))
    # u = (i + 0.5) / 8: 1/16 and 3/16 of the first quarter, then steps of 1/8 of the other three.
    expected = torch.tensor(
        [[1.25, 1.75, *(2 + 2 * (u - 0.25) / 0.75 for u in (torch.arange(2, 8) + 0.5) / 8)]]
    )
    assert torch.allclose(t, expected, atol=1e-3)
    ends = sample_importance(edges, weights, 5, None)
    assert torch.allclose(ends[0, [0, 1, -1]], torch.tensor([1.0, 2.0, 4.0]), atol=1e-3)


def test_an_empty_ray_is_sampled_uniformly():
    edges = torch.linspace(1, 3, 9)[None]
    t = sample_importance(edges, torch.zeros(1, 8), 4, torch.tensor([0.5]))
    assert torch.allclose(t[0], torch.tensor([1.25, 1.75, 2.25, 2.75]), atol=1e-5)


def test_weights_are_blurred_to_their_neighbors():
    # Maxima of neighbors, zero-padded: 0 4 4 0 0; then the mean of neighbors plus the floor.
    assert torch.allclose(
        blur_weights(torch.tensor([[0.0, 4.0, 0.0, 0.0]])), torch.tensor([[2.01, 4.01, 2.01, 0.01]])
    )


def march_through(march, sigma_of, near=1.0, far=3.0):
    """March one ray through a density sigma_of(t) of color 1."""

    def evaluate(t):
        return sigma_of(t), torch.ones(*t.shape, 3)

    return march_rays(
        march, torch.tensor([near]), torch.tensor([far]), None, evaluate, torch.nn.functional.relu
    )


@pytest.mark.parametrize(
    "march",
    [RayMarching(33), RayMarching(33, 16), RayMarching(33, 0, "midpoints"), RayMarching(33, 16, "midpoints")],
)
def test_the_opacity_of_a_homogeneous_ray_for_all_marching_settings(march):
    pixels = march_through(march, lambda t: torch.full_like(t, 0.7))
    # Midpoint quadrature omits half a bin at the start and exceeds the end by at most as much.
    slack = 0.7 * 2 / 30 if march.quadrature == "midpoints" else 1e-6
    assert pixels.opacity.item() == pytest.approx(1 - math.exp(-0.7 * 2), abs=slack)


def test_opacity_with_unit_chord_is_independent_of_the_length_of_the_chord():
    opacities = [
        march_through(RayMarching(8, unit="chord"), lambda t: torch.full_like(t, 0.7), far=far).opacity.item()
        for far in (1.5, 3.0, 9.0)
    ]
    assert opacities == pytest.approx([1 - math.exp(-0.7)] * 3)


def test_importance_samples_resolve_a_thin_wall():
    # A wall 0.02 thick of optical depth 3 at t = 2: its opacity is 1 - exp(-3).
    def wall(t):
        return 150.0 * ((t - 2.0).abs() < 0.01) + 5.0 * ((t - 2.0).abs() < 0.05)

    exact = 1 - math.exp(-(150 * 0.02 + 5 * 0.1))
    even, drawn = (march_through(RayMarching(64, extra), wall).opacity.item() for extra in (0, 40))
    assert abs(drawn - exact) < 0.05 < abs(even - exact)


def test_too_few_samples_are_an_error():
    with pytest.raises(ValueError, match=r"found 8 samples, of which 8 are importance samples"):
        RayMarching(8, 8)
    with pytest.raises(ValueError, match="at least 4 samples per ray"):
        RayMarching(6, 3, "midpoints")
