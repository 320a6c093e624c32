"""What the renderer of a step reads and writes, forward and backward."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lrm_pl.models.lrm import LRM
from lrm_pl.models.triplane import Triplane
from lrm_pl.planning.ledger import Ledger, Operation
from lrm_pl.planning.simulate import FakeRenderer, StepShape, branches, fake_copy, opened_operators
from lrm_pl.rendering.renderer import Renderer


def renderer_operations(lrm: LRM, renderer: Renderer, shape: StepShape) -> tuple[Operation, ...]:
    """Return all operations from planes to pixels and back: the field, rays, sampling, MLP, compositing.

    Args:
        lrm: The network, of which the decoder is used.
        renderer: The renderer.
        shape: The batch.

    Returns:
        Operations of the parts "renderer" and "backward". Gradients of the pixels are given.
    """
    ledger = Ledger(opened_operators(shape))
    with FakeTensorMode(allow_non_fake_inputs=True), branches(shape):
        decoder = fake_copy(lrm.decoder).train()
        tokens = torch.empty(shape.objects, *lrm.transformer.tokens.shape[-2:])
        with torch.no_grad():
            planes = fake_copy(lrm.upsampler)(tokens).to(shape.dtype).requires_grad_()
        views = shape.objects, shape.views
        c2w, fxfycxcy = torch.empty(*views, 4, 4), torch.empty(*views, 4)
        jitter = torch.empty(*views, shape.size, shape.size)
        with ledger, torch.autocast("cpu", shape.dtype, enabled=shape.dtype != torch.float32):
            ledger.part = "renderer"
            field = decoder.field(Triplane(planes, lrm.plane_layout))
            rendering = FakeRenderer(renderer, shape, ledger)(field, c2w, fxfycxcy, (shape.size,) * 2, jitter)
            pixels = rendering.rgb, rendering.opacity, rendering.depth
            ledger.part = "backward"
            torch.autograd.grad(
                pixels, [planes, *decoder.parameters()], [torch.empty_like(x) for x in pixels]
            )
    return tuple(ledger.operations)


def renderer_bytes(lrm: LRM, renderer: Renderer, shape: StepShape) -> float:
    """Return the bytes of memory that all operations of the renderer read and write, forward and backward."""
    return sum(x.moved for x in renderer_operations(lrm, renderer, shape))
