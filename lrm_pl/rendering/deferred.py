"""Rendering as ONE operation for autograd: deferred back-propagation (ARF, Zhang et al. 2022, section 4.2).

Forward runs ray chunk by ray chunk without a graph. Backward runs the chunks again, each with a small graph of its
own, adds into one gradient of the planes in place, and returns every gradient once. So memory does not grow with
the rendered area, chunks fit the cache, and DDP, FSDP2, DeepSpeed and accumulation see an ordinary operation.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.rendering.compositing import composite
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.sampling import stratified


def render_deferred(
    field: Field,
    origins: Float[Tensor, "B R 3"],
    directions: Float[Tensor, "B R 3"],
    near: Float[Tensor, "B R"],
    far: Float[Tensor, "B R"],
    jitter: Float[Tensor, "B R"] | None,
    samples: int,
    chunk: int,
) -> Rendering:
    """Render rays through the field of each object.

    Args:
        field: The objects' fields.
        origins: Ray origins; all rays of all views of object b in row b.
        directions: Unit directions.
        near: Start of each ray's interval.
        far: End of each ray's interval; rays with far <= near see nothing and cost nothing.
        jitter: Place of the samples in their bins, None for the middle.
        samples: K samples a ray.
        chunk: Points decoded at a time.

    Returns:
        Pixels with rays of shape (B, R). Differentiable in the field's planes and weights, not in the rays.
    """
    rays = _Rays(origins, directions, near, far, jitter, samples, max(1, chunk // samples))
    rgb, opacity, depth = _Deferred.apply(field, rays, field.planes, *field.weights)  # type: ignore[no-untyped-call]
    return Rendering(rgb, opacity, depth)


def render_plain(
    field: Field,
    origins: Float[Tensor, "B R 3"],
    directions: Float[Tensor, "B R 3"],
    near: Float[Tensor, "B R"],
    far: Float[Tensor, "B R"],
    jitter: Float[Tensor, "B R"] | None,
    samples: int,
) -> Rendering:
    """Render as one ordinary graph: the slow, obvious twin of ``render_deferred``."""
    t, delta = stratified(near, far, samples, jitter)
    points = origins.unsqueeze(-2) + t.unsqueeze(-1) * directions.unsqueeze(-2)  # (B, R, K, 3)
    sigma, rgb = [], []
    for index in range(points.shape[0]):
        features = field.sample(field.planes[index], points[index].reshape(-1, 3))
        density, colour = field.decode(features, field.weights)
        sigma.append(density.view(points.shape[1:3]))
        rgb.append(colour.view(*points.shape[1:3], 3))
    return composite(torch.stack(sigma), torch.stack(rgb), t, delta)


class _Rays:
    """The rays of a call, and the walk over them in chunks that fit the cache; holds no graph."""

    def __init__(
        self,
        origins: Tensor,
        directions: Tensor,
        near: Tensor,
        far: Tensor,
        jitter: Tensor | None,
        samples: int,
        rays_per_chunk: int,
    ) -> None:
        self.origins, self.directions, self.near, self.far = origins, directions, near, far
        self.jitter, self.samples, self.rays_per_chunk = jitter, samples, rays_per_chunk
        self.hits = [row.nonzero().squeeze(-1) for row in far > near]  # one list of ray numbers an object

    def chunks(self, index: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (ray numbers, points (r K, 3), t (r, K), delta (r)) of the rays of an object that hit its bounds."""
        for rays in self.hits[index].split(self.rays_per_chunk):
            jitter = None if self.jitter is None else self.jitter[index, rays]
            t, delta = stratified(self.near[index, rays], self.far[index, rays], self.samples, jitter)
            directions = self.directions[index, rays].unsqueeze(-2)
            points = torch.addcmul(self.origins[index, rays].unsqueeze(-2), directions, t.unsqueeze(-1))
            yield rays, points.view(-1, 3), t, delta


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, field: Field, rays: _Rays, planes: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.field, ctx.rays = field, rays
        ctx.save_for_backward(planes, *weights)
        ctx.autocast = _autocast_state(planes.device.type)
        shape = rays.near.shape
        rgb, opacity, depth = (planes.new_zeros(size) for size in ((*shape, 3), shape, shape))
        for index in range(shape[0]):
            for numbers, points, t, delta in rays.chunks(index):
                density, colour = field.decode(field.sample(planes[index], points), weights)
                pixels = composite(density.view(t.shape), colour.view(*t.shape, 3), t, delta)
                rgb[index, numbers], opacity[index, numbers] = pixels.rgb, pixels.opacity
                depth[index, numbers] = pixels.depth
        return rgb, opacity, depth

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        field, rays = ctx.field, ctx.rays
        planes, *weights = (tensor.detach() for tensor in ctx.saved_tensors)
        weights = [weight.requires_grad_() for weight in weights]
        plane_grad = torch.zeros_like(planes)
        weight_grads = [torch.zeros_like(weight) for weight in weights]
        with ctx.autocast():
            for index in range(planes.shape[0]):
                buffer = field.gradient_buffer(planes[index])
                for numbers, points, t, delta in rays.chunks(index):
                    features = field.sample(planes[index], points).requires_grad_()
                    with torch.enable_grad():
                        density, colour = field.decode(features, tuple(weights))
                        pixels = composite(density.view(t.shape), colour.view(*t.shape, 3), t, delta)
                    chunk_grads = torch.autograd.grad(
                        (pixels.rgb, pixels.opacity, pixels.depth),
                        (features, *weights),
                        [grad[index, numbers] for grad in grads],
                    )
                    field.accumulate(buffer, points, chunk_grads[0])
                    for total, part in zip(weight_grads, chunk_grads[1:], strict=True):
                        total += part
                torch.sum(buffer, dim=0, out=plane_grad[index])
        return None, None, plane_grad, *weight_grads


def _autocast_state(device: str) -> Any:  # noqa: ANN401
    """Remember the autocast state of now, to enter it again in backward."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled=True) if enabled else contextlib.nullcontext()
