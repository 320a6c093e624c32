"""PSNR, SSIM and LPIPS compared with values computed by hand."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.metrics import ImageMetrics, NotFiniteError, psnr, ssim
from tests.builders import Operators

#: With the shape checker enabled, its error is raised first.
WRONG_SHAPE = (ValueError, TypeCheckError)


def flat(*values, side=16):
    """One constant image for each value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, side, side)


def noise(n, seed=0):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_uniform_errors_of_0_1_and_0_5_have_a_psnr_of_20_and_6_db():
    found = psnr(flat(0.3, 0.25), flat(0.4, 0.75))
    assert found.tolist() == pytest.approx([20.0, 6.0206], abs=1e-3)


def test_the_pooled_psnr_differs_from_the_mean_psnr():
    prediction, target = flat(0.5, 0.5), flat(0.6, 0.51)  # squared errors 0.01 and 0.0001: 20 dB and 40 dB
    assert float(psnr(prediction, target).mean()) == pytest.approx(30.0, abs=1e-3)
    metrics = ImageMetrics()
    metrics.update(prediction, target)  # the mean of the squared errors is 0.00505
    assert metrics.compute().psnr_pooled == pytest.approx(22.967, abs=1e-3)


def test_identical_images_have_infinite_psnr_and_ssim_1():
    images = noise(2)
    assert psnr(images, images).tolist() == [math.inf, math.inf]
    metrics = ImageMetrics()
    metrics.update(images, images)
    assert metrics.compute().psnr_pooled == math.inf
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])


def test_the_ssim_of_constant_images_is_its_luminance_term():
    # No variance, so SSIM = (2 a b + c1) / (a^2 + b^2 + c1), c1 = 0.01^2.
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert float(ssim(flat(0.2), flat(0.6))) == pytest.approx(expected, abs=1e-4)


def test_batches_and_ranks_add_up_to_the_means_over_all_images():
    prediction, target = noise(5), noise(5, seed=1)
    whole, here, there = ImageMetrics(), ImageMetrics(), ImageMetrics()
    whole.update(prediction, target)
    here.update(prediction[:1], target[:1])
    here.update(prediction[1:3], target[1:3])
    there.update(prediction[3:], target[3:])
    here.merge_state(there)
    assert here.compute() == pytest.approx(whole.compute(), nan_ok=False)
    assert whole.compute().images == 5
    assert whole.compute().lpips is None
    assert whole.compute().psnr == pytest.approx(float(psnr(prediction, target).mean()))
    pooled = -10 * math.log10((prediction - target).square().mean())
    assert whole.compute().psnr_pooled == pytest.approx(pooled)
    assert whole.compute().ssim == pytest.approx(float(ssim(prediction, target).mean()))


def test_one_perfect_image_makes_the_mean_psnr_infinite_but_not_the_pooled_one():
    metrics = ImageMetrics()
    metrics.update(flat(0.5, 0.5), flat(0.5, 0.6))
    scores = metrics.compute()
    assert scores.psnr == math.inf
    assert scores.psnr_pooled == pytest.approx(23.0103, abs=1e-3)  # squared error 0.01 / 2


def test_lpips_is_averaged_over_images(monkeypatch):
    network = object.__new__(PerceptualLoss)  # without weights: each image's mean stands for its LPIPS
    monkeypatch.setattr(PerceptualLoss, "to", lambda self, device: self)
    monkeypatch.setattr(PerceptualLoss, "__call__", lambda self, ours, theirs: ours.mean((1, 2, 3)))
    metrics = ImageMetrics(network)
    metrics.update(flat(0.1, 0.2), flat(0.0, 0.0))
    metrics.update(flat(0.6), flat(0.0))
    assert metrics.compute().lpips == pytest.approx(0.3)
    metrics.reset()
    metrics.update(flat(0.5), flat(0.0))
    assert metrics.compute().lpips == pytest.approx(0.5)
    assert not list(metrics.parameters())


def test_compute_without_images_is_an_error():
    metrics = ImageMetrics()
    with (
        pytest.warns(UserWarning, match="before the ``update``"),
        pytest.raises(ValueError, match="found none"),
    ):
        metrics.compute()


def test_metrics_are_computed_in_float32_under_autocast():
    prediction, target = noise(2), noise(2, seed=1)
    expected = ssim(prediction, target), psnr(prediction, target)
    with torch.autocast("cpu", torch.bfloat16):
        found = ssim(prediction, target), psnr(prediction, target)
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(expected, found, strict=True))


def test_values_slightly_outside_the_range_are_clamped_and_other_values_are_rejected():
    assert psnr(flat(1.001), flat(1.0)).tolist() == [math.inf]
    with pytest.raises(ValueError, match=r"a target with values in \[0, 1\], but found \[0, 255\]"):
        psnr(flat(0.5), torch.cat([flat(0.0), flat(255.0)], dim=-1)[..., 8:24])
    with pytest.raises(ValueError, match=r"a prediction with values in \[0, 1\], but found \[nan, nan\]"):
        psnr(flat(math.nan), flat(0.5))


def test_different_shapes_are_rejected():
    for metric in (psnr, ssim, ImageMetrics().update):
        with pytest.raises(WRONG_SHAPE, match=r"2, ?3, ?16, ?16[\s\S]*2, ?3, ?8, ?16"):
            metric(noise(2), noise(2)[:, :, :8])
    with pytest.raises(ValueError, match=r"at least 11 x 11 pixels, but found \(8, 8\)"):
        ssim(flat(0.5, side=8), flat(0.5, side=8))


def test_update_does_not_synchronize_with_a_gpu_and_compute_checks_the_range():
    metrics = ImageMetrics()
    with Operators() as operators:
        metrics.update(noise(2), noise(2, seed=1))
        metrics.update(flat(0.5), flat(255.0))
        metrics.update(noise(2), noise(2, seed=2))
    assert operators.calls["aten::aminmax"] == 6
    assert not operators.calls["aten::_local_scalar_dense"]  # each would wait for a GPU
    assert not operators.calls["aten::nonzero"]
    with pytest.raises(ValueError, match=r"a target with values in \[0, 1\], but found \[.*, 255\]"):
        metrics.compute()
    metrics.reset()
    metrics.update(flat(0.5), flat(0.6))
    assert metrics.compute().psnr == pytest.approx(20.0, abs=1e-3)


def test_nan_in_one_image_is_an_error():
    metrics = ImageMetrics()
    metrics.update(flat(0.5, math.nan), flat(0.5, 0.5))
    metrics.update(flat(0.5), flat(0.5))
    with pytest.raises(NotFiniteError, match=r"expected finite predictions, but found NaN or infinity"):
        metrics.compute()


def test_tf32_is_disabled_only_during_the_computation_of_metrics(monkeypatch):
    seen = []

    def note(*_, **__):
        seen.append(torch.backends.cudnn.allow_tf32)
        return torch.zeros(1)

    network = object.__new__(PerceptualLoss)
    monkeypatch.setattr(PerceptualLoss, "to", lambda self, device: self)
    monkeypatch.setattr(PerceptualLoss, "__call__", note)
    monkeypatch.setattr("lrm_pl.metrics.structural_similarity_index_measure", note)
    ssim(flat(0.5), flat(0.5))
    ImageMetrics(network).update(flat(0.5), flat(0.5))
    assert seen == [False] * 3
    assert torch.backends.cudnn.allow_tf32
