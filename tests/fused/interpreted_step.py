"""Compare training steps with the kernels of the fused decoder, run by Triton's interpreter, with PyTorch operators.

Run ``TRITON_INTERPRET=1 python -m tests.fused.interpreted_step``.
"""

import sys

import torch

from lrm_pl.data.batch import Batch, Views
from lrm_pl.geometry.cameras import orbit
from lrm_pl.kernels import decode_along_rays as fused
from lrm_pl.kernels import device
from lrm_pl.losses.objective import Objective
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.lrm import LRM
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.module import LRMModule

BOUND = 2e-4


def gradients(activation, renderer):
    """Render two views of two objects, and return the loss and all gradients."""
    torch.manual_seed(0)
    network = LRM(
        encoder=ImageEncoder("test_vit", 32),
        decoder=NeRFDecoder(channels=4, width=16, layers=4, activation=activation),
        dim=16, depth=1, heads=2, camera_dim=8, plane_tokens=4,
    )  # fmt: skip
    module = LRMModule(network, renderer, Objective(lpips=0.0, mask=0.1, opacity=0.01))
    c2w = orbit(2, 2.37).expand(2, -1, -1, -1)
    cameras = torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(2, 2, 4)

    def views(size, count):
        return Views(
            torch.rand(2, count, 3, size, size), torch.rand(2, count, size, size), torch.ones(2, count, 3),
            c2w[:, :count].contiguous(), cameras[:, :count].contiguous(), torch.rand(2, count, size, size),
        )  # fmt: skip

    batch = Batch(("a", "b"), views(32, 1), views(8, 2), torch.ones(2))
    loss = sum(module.objective(module.render_targets(batch), 0).values())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in network.named_parameters()}


def main():
    """Compare steps, and check the schemas and the fake implementations of the operators."""
    torch.set_num_threads(1)
    calls = []
    launch = fused.plan_launch
    fused.plan_launch = lambda *given: calls.append(1) or launch(*given)
    wrong = 0
    for activation, renderer in (("relu", Renderer(8)), ("silu", Renderer(8, 4, "box", "midpoints"))):
        device.HOST_TYPES = {"cpu"}
        expected, plain = gradients(activation, renderer)
        assert not calls
        device.HOST_TYPES = frozenset()
        found, ours = gradients(activation, renderer)
        assert calls, "the kernels were launched"
        calls.clear()
        far = {name: float((ours[name] - g).norm() / g.norm().clamp_min(1e-12)) for name, g in plain.items()}
        worst = max(far, key=far.get)
        print(f"{activation}: loss {found:.7f}, plain {expected:.7f}; {worst}: {far[worst]:.1e}")
        wrong += not (abs(found - expected) <= 1e-6 and far[worst] <= BOUND)

    decoder = NeRFDecoder(channels=4, width=16, layers=3)
    mlp = fused.pack(
        tuple(x for layer in decoder.layers for x in (layer.weight, layer.bias))[1:], torch.float32
    )
    rays = torch.rand(4, 4, 3)
    samples = [rays, rays, torch.rand(4, 4, 4), torch.ones(4, 4, dtype=torch.bool)]
    given = torch.randn(3, 8, 8, 16), samples, list(mlp), [0, 1, 0, 2, 1, 2], False
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lrm_pl.decode_along_rays.default, given, test_utils=checks)
    total, grad = torch.zeros(3, 8, 8, 16), torch.randn(4, 4, 4, 4)
    torch.library.opcheck(
        torch.ops.lrm_pl.decode_along_rays_backward.default, (total, grad, *given), test_utils=checks
    )
    print(f"{2 - wrong} passed, {wrong} failed")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
