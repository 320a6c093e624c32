"""Rendering and LPIPS on an accelerator against their plain twins and a CPU, in float32 and under bf16 autocast."""

import contextlib

import pytest
import torch

from lrm_pl.geometry.cameras import orbit
from lrm_pl.kernels.device import without_tf32
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.triplane import Triplane
from lrm_pl.rendering.deferred import render_plain
from lrm_pl.rendering.ray_marching import RayMarching
from lrm_pl.rendering.renderer import Renderer

#: Largest relative difference by activation and type. Points are computed in another order, and a rounding moves some
#: across the kink of ReLU: 3e-4 of a gradient, on a CPU too. In bf16, whose ulp is 8e-3, every layer rounds its output.
BOUNDS = {
    ("silu", torch.float32): None,  # ``Device.rounding``
    ("relu", torch.float32): 1e-3,
    ("silu", torch.bfloat16): 0.03,
    ("relu", torch.bfloat16): 0.03,
}


def rendered(field, renderer, plain):
    """Render 2 views of each object of 16 x 16 pixels, with jitter."""
    device = field.planes.device
    c2w, cameras = orbit(2, 2.6, 20.0).expand(2, 2, 4, 4).to(device), torch.tensor([1.07, 1.07, 0.5, 0.5])
    cameras = cameras.expand(2, 2, 4).to(device)
    jitter = torch.rand(2, 2, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
    if not plain:
        return renderer(field, c2w, cameras, (16, 16), jitter)
    return render_plain(field, renderer.rays(c2w, cameras, (16, 16), jitter), renderer.march)


@pytest.mark.parametrize(("hidden", "dtype"), BOUNDS, ids=str)
@pytest.mark.parametrize(
    "march",
    [RayMarching(16), RayMarching(16, 8, "midpoints"), RayMarching(16, unit="chord")],
    ids=str,
)
def test_deferred_rendering_matches_the_reference_in_values_and_gradients(device, hidden, dtype, march):
    torch.manual_seed(0)
    decoder = NeRFDecoder(channels=4, width=32, layers=4, activation=hidden).to(device.name)
    planes = torch.randn(2, 3, 4, 12, 12).to(device.name).requires_grad_()
    renderer = Renderer(march.samples, march.importance, "box", march.quadrature, march.unit)
    found = []
    for plain in (False, True):
        reduced = torch.autocast(device.name, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with reduced:
            pixels = rendered(decoder.field(Triplane(planes)), renderer, plain)
        weights = torch.linspace(-1, 1, pixels.rgb.numel(), device=device.name).view(-1)
        loss = pixels.rgb.reshape(-1) @ weights + pixels.opacity.square().sum()
        loss = loss + 0.1 * (pixels.depth * pixels.opacity).sum()
        gradients = torch.autograd.grad(loss, [planes, *decoder.parameters()])
        found.append([pixels.rgb.flatten(), pixels.opacity.flatten(), *gradients])
    times = (BOUNDS[hidden, dtype] or device.rounding) / device.rounding
    wrong = [
        at
        for at, (ours, theirs) in enumerate(zip(*found, strict=True))
        if not device.close(ours, theirs, times)
    ]
    assert wrong == []


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_and_its_gradient_match_a_cpu(device, lpips_networks, net):
    generator = torch.Generator().manual_seed(0)
    target = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8, generator=generator), 48, mode="bilinear")
    prediction = (target + 0.1 * torch.randn(target.shape, generator=generator)).clamp(0, 1)
    found = []
    for name, choose in ((device.name, device.to_accelerator), ("cpu", device.to_cpu)):
        choose()
        ours = prediction.to(name).requires_grad_()
        with without_tf32():
            distances = lpips_networks[net].to(name)(ours, target.to(name))
            found.append((distances, *torch.autograd.grad(distances.sum(), ours)))
    (distances, gradient), (expected, expected_gradient) = found
    assert device.close(distances, expected)
    # A rounding moves some pixels across the kinks of ReLU and of max pooling.
    assert device.close(gradient, expected_gradient, 5e-3 / device.rounding)
