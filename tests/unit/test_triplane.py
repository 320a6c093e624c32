import warnings

import pytest
import torch

from lrm_pl.conventions import PLANE_AXES
from lrm_pl.kernels import device
from lrm_pl.kernels.triplane import (
    accumulate_gradient,
    triplane_sample,
    triplane_sample_plain,
)

AXES = PLANE_AXES["lrm"]


def planes_and_points(channels=5, side=7, count=300):
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn(3, side, side, channels, generator=generator)
    points = torch.rand(count, 3, generator=generator) * 2.6 - 1.3  # some outside the field
    return planes, points


def test_bilinear_sampling_by_hand():
    # A 2 x 2 plane over [-1, 1]: centers at -0.5 and 0.5. At x = 0, y = -0.5 the sample is the mean of the first row;
    # at x = 1.0 (the border) the neighbor outside counts as zero.
    plane = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).view(1, 2, 2, 1)
    points = torch.tensor(
        [[0.0, -0.5, 9.0], [0.0, 0.0, 9.0], [1.0, -0.5, 9.0], [2.0, -0.5, 9.0], [0.5, 0.25, 9.0]]
    )
    values = triplane_sample(plane, points, ((0, 1),), "sum")
    assert torch.allclose(values[:, 0], torch.tensor([2.0, 4.0, 1.5, 0.0, 6.0]))


def test_each_plane_is_sampled_along_its_axes():
    # Plane p holds its column coordinate + 10 x its row coordinate, exact at pixel centers.
    centers = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    plane = centers[None, :] + 10 * centers[:, None]
    planes = plane.expand(3, 4, 4)[..., None].contiguous()
    point = torch.tensor([[0.25, -0.25, 0.75]])
    values = triplane_sample(planes, point, AXES, "concat")
    expected = torch.tensor([[0.25 - 2.5, 0.25 + 7.5, -0.25 + 7.5]])  # (x, y), (x, z), (y, z)
    assert torch.allclose(values, expected)


@pytest.mark.parametrize("reduce", ["sum", "concat"])
def test_sampling_matches_the_reference_in_values_and_gradients(reduce):
    planes, points = planes_and_points()
    results = []
    for sample in (triplane_sample, triplane_sample_plain):
        leaf = planes.clone().requires_grad_()
        values = sample(leaf, points, AXES, reduce)
        (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
        results.append((values.detach(), leaf.grad))
    (fast, fast_grad), (plain, plain_grad) = results
    assert torch.allclose(fast, plain, atol=1e-5)
    assert torch.allclose(fast_grad, plain_grad, atol=1e-4)


@pytest.mark.parametrize("reduce", ["sum", "concat"])
def test_accumulating_adds_the_gradient_of_sampling(reduce):
    planes, points = planes_and_points()
    leaf = planes.clone().requires_grad_()
    values = triplane_sample_plain(leaf, points, AXES, reduce)
    grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    values.backward(grad)
    total = torch.full_like(planes, 2.0)
    accumulate_gradient(total, points, grad, AXES, reduce)
    assert torch.allclose(total - 2, leaf.grad, atol=1e-4)


def test_sampling_is_differentiable_in_the_planes_by_finite_differences():
    planes, points = planes_and_points(channels=2, side=3, count=20)
    leaf = planes.clone().requires_grad_()
    weight = torch.linspace(-1, 1, 40).view(20, 2)
    (triplane_sample(leaf, points, AXES, "sum") * weight).sum().backward()
    for index in [(0, 0, 0, 0), (1, 2, 1, 1), (2, 1, 1, 0)]:
        step = torch.zeros_like(planes)
        step[index] = 0.5  # linear: any step is exact
        difference = [
            (triplane_sample(planes + sign * step, points, AXES, "sum") * weight).sum() for sign in (1, -1)
        ]
        assert torch.isclose(leaf.grad[index], difference[0] - difference[1], atol=1e-4)


def test_the_operator_passes_opcheck():
    planes, points = planes_and_points(count=16)
    axes = [axis for pair in AXES for axis in pair]
    arguments = (planes.requires_grad_(), points, axes, False)
    # opcheck reads .grad of a non-leaf tensor.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    torch.library.opcheck(torch.ops.lrm_pl.triplane_sample.default, arguments)


def test_samples_of_distant_points_are_zero():
    planes, _ = planes_and_points()
    points = torch.tensor([[1e9, -1e9, 1e30], [torch.inf, -torch.inf, torch.inf]])
    values = triplane_sample(planes, points, AXES, "sum")
    assert torch.equal(values, torch.zeros(2, 5))


def test_the_error_for_invalid_planes_contains_both_shapes():
    with pytest.raises(
        ValueError, match=r"expected planes of shape \(3, S, S, C\), but found \(2, 4, 4, 1\)"
    ):
        triplane_sample(torch.zeros(2, 4, 4, 1), torch.zeros(1, 3), AXES, "sum")


@pytest.fixture
def on_an_accelerator(monkeypatch):
    """Select the branches for accelerators on CPU tensors."""
    monkeypatch.setattr(device, "HOST_TYPES", frozenset())


@pytest.mark.parametrize("reduce", ["sum", "concat"])
def test_sampling_on_an_accelerator_matches_the_cpu_and_the_reference(reduce, monkeypatch):
    planes, points = planes_and_points()
    points = torch.cat([points, torch.tensor([[-1.0, 1.0, 0.0], [1e9, 0.0, -1e9]])])

    def values_and_gradient(sample):
        leaf = planes.clone().requires_grad_()
        values = sample(leaf, points, AXES, reduce)
        (values * torch.linspace(-1, 1, values.numel()).view_as(values)).sum().backward()
        return values.detach(), leaf.grad

    expected = [values_and_gradient(sample) for sample in (triplane_sample, triplane_sample_plain)]
    monkeypatch.setattr(device, "HOST_TYPES", frozenset())
    values, gradient = values_and_gradient(triplane_sample)
    assert values.is_contiguous()
    for other_values, other_gradient in expected:
        assert torch.allclose(values, other_values, atol=1e-5)
        assert torch.allclose(gradient, other_gradient, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["sum", "concat"])
def test_gradients_on_an_accelerator_match_the_cpu_and_have_no_graph(reduce, dtype, monkeypatch):
    planes, points = planes_and_points()
    values = triplane_sample(planes, points, AXES, reduce)
    grad = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, total = torch.full_like(planes, 2.0), torch.full_like(planes, 2.0)
    accumulate_gradient(expected, points, grad, AXES, reduce)
    monkeypatch.setattr(device, "HOST_TYPES", frozenset())
    with torch.no_grad():  # as in the backward of deferred rendering
        accumulate_gradient(total, points, grad, AXES, reduce)
    assert torch.allclose(total, expected, atol=1e-4)


def test_gradients_on_an_accelerator_are_added_to_a_view(on_an_accelerator):
    planes, points = planes_and_points()
    grad = torch.ones(len(points), planes.shape[-1])
    both = torch.zeros(2, *planes.shape)
    accumulate_gradient(both[1], points, grad, AXES, "sum")
    assert not both[0].any()
    assert both[1].any()


@pytest.mark.usefixtures("on_an_accelerator")
def test_sampling_on_an_accelerator_passes_opcheck():
    test_samples_of_distant_points_are_zero()
    test_bilinear_sampling_by_hand()
    test_each_plane_is_sampled_along_its_axes()
    test_the_operator_passes_opcheck()


@pytest.mark.usefixtures("on_an_accelerator")
@pytest.mark.parametrize("reduce", ["sum", "concat"])
def test_sampling_without_points_returns_an_empty_tensor(reduce):
    planes, points = planes_and_points(count=0)
    values = triplane_sample(planes, points, AXES, reduce)
    assert values.shape == (0, 5 if reduce == "sum" else 15)
    total = planes.clone()
    accumulate_gradient(total, points, values, AXES, reduce)
    assert torch.equal(total, planes)
