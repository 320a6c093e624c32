import math

import pytest
import torch

from lrm_pl.geometry.cameras import orbit
from lrm_pl.geometry.rays import pixel_rays, ray_interval
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.triplane import Triplane, TriplaneField
from lrm_pl.rendering.deferred import Rays, render_deferred, render_plain
from lrm_pl.rendering.ray_marching import RayBundle, RayMarching
from lrm_pl.rendering.renderer import Renderer
from tests.builders import CAMERA

EVEN = RayMarching(12)


def cameras(objects=2, views=2):
    c2w = orbit(views, 2.6, 20.0).expand(objects, views, 4, 4)
    return c2w, CAMERA.expand(objects, views, 4)


def tiny_field(fold=True, objects=2, activation="softplus"):
    torch.manual_seed(0)
    decoder = NeRFDecoder(channels=4, width=8, layers=3, density_activation=activation, fold=fold)
    planes = torch.randn(objects, 3, 4, 6, 6, requires_grad=True)
    return decoder, planes


def render(decoder, planes, chunk=96, plain=False, jitter=True, march=EVEN):
    c2w, fxfycxcy = cameras(len(planes))
    noise = torch.rand(len(planes), 2, 9, 9, generator=torch.Generator().manual_seed(1)) if jitter else None
    field = decoder.field(Triplane(planes))
    if not plain:
        renderer = Renderer(march.samples, march.importance, "sphere", march.quadrature, march.unit, chunk)
        return renderer(field, c2w, fxfycxcy, (9, 9), noise)
    origins, directions = pixel_rays(c2w, fxfycxcy, 9, 9)
    near, far = ray_interval(origins, directions, "sphere")
    rays = RayBundle(
        origins.flatten(1, 3), directions.flatten(1, 3), near.flatten(1), far.flatten(1),
        None if noise is None else noise.flatten(1),
    )  # fmt: skip
    return render_plain(field, rays, march)


def loss_and_gradients(decoder, planes, **options):
    """Return a loss of every output, and the gradients of planes and decoder weights."""
    pixels = render(decoder, planes, **options)
    flat = pixels.rgb.reshape(-1)
    loss = (flat * torch.linspace(-1, 1, flat.numel())).sum() + pixels.opacity.square().sum()
    loss = loss + 0.1 * (pixels.depth * pixels.opacity).sum()
    return loss.detach(), torch.autograd.grad(loss, [planes, *decoder.parameters()])


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_deferred_rendering_equals_the_reference_in_values_and_gradients(fold, activation):
    decoder, planes = tiny_field(fold, activation=activation)
    loss, gradients = loss_and_gradients(decoder, planes)
    expected_loss, expected = loss_and_gradients(decoder, planes, plain=True)
    assert torch.isclose(loss, expected_loss, rtol=1e-5)
    for gradient, other in zip(gradients, expected, strict=True):
        assert relative(gradient, other) < 1e-5


@pytest.mark.parametrize(
    "march",
    [
        RayMarching(12, 5), RayMarching(12, 6, "midpoints"), RayMarching(9, 0, "midpoints"),
        RayMarching(12, unit="chord"),
        RayMarching(12, 4, unit="chord"),
    ],
    ids=str,
)  # fmt: skip
def test_deferred_rendering_equals_the_reference_for_all_marching_settings(march):
    decoder, planes = tiny_field()
    loss, gradients = loss_and_gradients(decoder, planes, march=march)
    expected_loss, expected = loss_and_gradients(decoder, planes, plain=True, march=march)
    assert torch.isclose(loss, expected_loss, rtol=1e-5)
    for gradient, other in zip(gradients, expected, strict=True):
        assert relative(gradient, other) < 1e-5


def test_chunk_size_does_not_change_the_result():
    decoder, planes = tiny_field()
    loss, gradients = loss_and_gradients(decoder, planes, chunk=12)
    for chunk in (100, 10**6):
        other_loss, others = loss_and_gradients(decoder, planes, chunk=chunk)
        assert torch.isclose(loss, other_loss, rtol=1e-5)
        assert all(relative(a, b) < 1e-5 for a, b in zip(gradients, others, strict=True))


def test_objects_with_fewer_rays_than_threads_or_without_rays_are_rendered():
    decoder, planes = tiny_field()
    field = decoder.field(Triplane(planes))
    origins = torch.tensor([[[0.0, -2.0, 0.0]] * 2, [[0.0, -2.0, 5.0]] * 2])
    directions = torch.tensor([0.0, 1.0, 0.0]).expand(2, 2, 3)
    rays = RayBundle(origins, directions, *ray_interval(origins, directions, "sphere"))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pixels = render_deferred(field, Rays(rays, 1000, 12), RayMarching(12))
        (gradient,) = torch.autograd.grad(pixels.rgb.sum(), planes, retain_graph=True)
    finally:
        torch.set_num_threads(before)
    plain = render_plain(field, rays, RayMarching(12))
    (expected,) = torch.autograd.grad(plain.rgb[0].sum(), planes)
    assert torch.allclose(pixels.rgb[0], plain.rgb[0], atol=1e-6)
    assert torch.equal(pixels.rgb[1], torch.zeros(2, 3))
    assert relative(gradient, expected) < 1e-5


@pytest.mark.parametrize(("importance", "half"), [(0, False), (6, True)])
def test_rendering_is_bitwise_reproducible(importance, half):
    """With importance samples, weights are converted to bf16 twice per chunk, and two gradients are added."""
    decoder, planes = tiny_field()
    options = {"chunk": 24, "march": RayMarching(12, importance)}
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        first, second = (loss_and_gradients(decoder, planes, **options) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_folding_the_first_layer_into_the_planes_does_not_change_the_image():
    decoder, planes = tiny_field(fold=True)
    twin = NeRFDecoder(channels=4, width=8, layers=3, fold=False)
    twin.load_state_dict(decoder.state_dict())
    loss, gradients = loss_and_gradients(decoder, planes)
    expected_loss, expected = loss_and_gradients(twin, planes)
    assert torch.isclose(loss, expected_loss, rtol=1e-5)
    assert all(relative(a, b) < 1e-5 for a, b in zip(gradients, expected, strict=True))


def test_gradients_equal_finite_differences():
    decoder, planes = tiny_field(objects=1)
    _, (plane_gradient, *_) = loss_and_gradients(decoder, planes, jitter=False)
    index = plane_gradient.abs().flatten().argsort(descending=True)[:6]
    for flat in index.tolist():
        step = torch.zeros(planes.numel())
        step[flat] = 1e-2
        losses = [
            loss_and_gradients(
                decoder, planes.detach().add(sign * step.view_as(planes)).requires_grad_(), jitter=False
            )[0]
            for sign in (1, -1)
        ]
        difference = (losses[0] - losses[1]) / 2e-2
        assert torch.isclose(plane_gradient.flatten()[flat], difference, rtol=3e-2)


class ConstantSphere:
    """A field of constant density and color, whose image has a closed form."""

    reduce = "sum"

    def __init__(self, sigma, color):
        self.planes, self.weights = torch.zeros(1, 3, 1, 1, 1), ()
        self.sigma, self.color = sigma, color

    def sample(self, planes, points):
        return points

    def accumulate(self, total, points, grad):
        raise AssertionError("nothing to differentiate")

    def decode(self, features, weights):
        return features.new_full((len(features),), self.sigma), self.color.expand(len(features), 3)

    def activate(self, raw):
        return raw


def test_a_sphere_of_constant_density_has_the_closed_form_image():
    c2w, fxfycxcy = cameras(1, 1)
    color = torch.tensor([0.1, 0.6, 0.9])
    pixels = Renderer(7)(ConstantSphere(0.9, color), c2w, fxfycxcy, (16, 16))
    origins, directions = pixel_rays(c2w, fxfycxcy, 16, 16)
    closest = torch.linalg.cross(origins, directions).norm(dim=-1)  # distance of the ray from the center
    chord = 2 * (1 - closest.square()).clamp_min(0).sqrt()
    opacity = 1 - torch.exp(-0.9 * chord)
    assert (opacity == 0).any(), "some rays miss"
    assert torch.allclose(pixels.opacity, opacity, atol=1e-4)
    assert torch.allclose(pixels.rgb, opacity[..., None] * color, atol=1e-4)


def test_the_orientation_of_the_image():
    # A blob on the world's +x, -y (near), +z side must show up right of the middle and above it, seen from -y.
    class Blob(ConstantSphere):
        def decode(self, features, weights):
            near = (features - torch.tensor([0.5, -0.3, 0.4])).norm(dim=-1) < 0.2
            return near.float() * 50, torch.ones(len(features), 3)

    c2w = orbit(1, 2.6, 0.0)[None]
    opacity = Renderer(96, bounds="box")(
        Blob(0, torch.ones(3)), c2w, CAMERA.expand(1, 1, 4), (32, 32)
    ).opacity[0, 0]
    rows, columns = (opacity > 0.5).nonzero().float().mean(dim=0)
    # By hand: depth along the axis 2.6 - 0.3 = 2.3, so u = 0.5 + 1.07 * 0.5 / 2.3, v = 0.5 - 1.07 * 0.4 / 2.3.
    assert math.isclose((columns.item() + 0.5) / 32, 0.5 + 1.07 * 0.5 / 2.3, abs_tol=0.02)
    assert math.isclose((rows.item() + 0.5) / 32, 0.5 - 1.07 * 0.4 / 2.3, abs_tol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_only_the_precision_of_the_decoder(dtype):
    seen = {}

    class Spy(TriplaneField):
        def sample(self, planes, points):
            seen["planes"], seen["points"] = planes.dtype, points.dtype
            return super().sample(planes, points)

        def decode(self, features, weights):
            sigma, rgb = super().decode(features, weights)
            seen["sigma"], seen["rgb"] = sigma.dtype, rgb.dtype
            return sigma, rgb

    decoder, planes = tiny_field()
    c2w, fxfycxcy = cameras()
    with torch.autocast("cpu", dtype):
        field = decoder.field(Triplane(planes))
        field = Spy(**vars(field))
        pixels = Renderer(12)(field, c2w, fxfycxcy, (9, 9))
    assert set(seen.values()) == {torch.float32}
    assert {pixels.rgb.dtype, pixels.opacity.dtype, pixels.depth.dtype} == {torch.float32}
    pixels.rgb.sum().backward()
    assert planes.grad.dtype == torch.float32
    reference = render(*tiny_field(), jitter=False)
    assert torch.allclose(pixels.rgb.detach(), reference.rgb.detach(), atol=2e-2)
