import math

import torch

from lrm_pl.rendering.compositing import composite
from lrm_pl.rendering.sampling import stratified


def test_a_box_of_constant_density_has_the_closed_form_opacity_and_colour():
    near, far, sigma = torch.tensor([1.0]), torch.tensor([2.5]), 0.8
    colour = torch.tensor([0.2, 0.5, 0.9])
    for samples in (1, 7, 64):
        t, delta = stratified(near, far, samples, None)
        pixels = composite(torch.full((1, samples), sigma), colour.expand(1, samples, 3), t, delta[..., None])
        opacity = 1 - math.exp(-sigma * 1.5)
        assert math.isclose(pixels.opacity.item(), opacity, rel_tol=1e-5)
        assert torch.allclose(pixels.rgb[0], opacity * colour, rtol=1e-5)


def test_depth_of_a_constant_density_converges_to_the_closed_form():
    # E[t] = integral of t sigma exp(-sigma (t - near)) / opacity = near + 1 / sigma - L exp(-sigma L) / opacity.
    near, far, sigma, length = 1.0, 3.0, 1.5, 2.0
    t, delta = stratified(torch.tensor([near]), torch.tensor([far]), 512, None)
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


def test_over_a_background_the_rest_of_the_light_comes_from_it():
    pixels = composite(
        torch.tensor([[2.0]]), torch.zeros(1, 1, 3), torch.tensor([[1.0]]), torch.tensor([[0.5]])
    )
    assert torch.allclose(
        pixels.over(torch.tensor([1.0, 0.5, 0.0]))[0], math.exp(-1) * torch.tensor([1, 0.5, 0])
    )


def test_huge_densities_give_no_nan_in_values_or_gradients():
    sigma = torch.tensor([[0.0, 1e4, 6e4]], requires_grad=True)
    pixels = composite(sigma, torch.ones(1, 3, 3), torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0]]))
    (pixels.rgb.sum() + pixels.depth.sum()).backward()
    assert pixels.opacity.item() == 1
    assert sigma.grad.isfinite().all()


def test_jitter_moves_samples_inside_their_bins_only():
    near, far = torch.tensor([1.0]), torch.tensor([3.0])
    low, width = stratified(near, far, 4, torch.tensor([0.0]))
    high, _ = stratified(near, far, 4, torch.tensor([0.999]))
    assert width.item() == 0.5
    assert torch.allclose(low[0], torch.tensor([1.0, 1.5, 2.0, 2.5]))
    assert torch.allclose(high[0], torch.tensor([1.4995, 1.9995, 2.4995, 2.9995]))


def test_compositing_is_float32_under_autocast():
    sigma, rgb = torch.rand(5, 16), torch.rand(5, 16, 3)
    t, delta = stratified(torch.ones(5), 3 * torch.ones(5), 16, None)
    expected = composite(sigma, rgb, t, delta[..., None])
    with torch.autocast("cpu", torch.bfloat16):
        pixels = composite(sigma, rgb, t, delta[..., None])
    assert pixels.rgb.dtype == pixels.opacity.dtype == pixels.depth.dtype == torch.float32
    assert torch.equal(pixels.rgb, expected.rgb)
