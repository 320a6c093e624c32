"""Rendering with the fused GPU decoder in a single autograd operation on grids of pixels.

``is_fused`` decides whether a field is rendered by ``kernels.decode_along_rays`` or by the methods ``sample`` and
``decode`` of the field. The fused decoder processes compact tiles of pixels, so rays that miss the bounds stay in the
grid and are masked. The outputs of the decoder take 16 bytes per sample. Up to 2 GB of outputs are saved for the
backward pass, and the remaining outputs are recomputed, which bounds the memory usage.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.kernels.decode_along_rays import (
    WIDTHS,
    PackedMLP,
    RaySamples,
    accumulate_gradient,
    decode_along_rays,
    pack,
    unpack,
)
from lrm_pl.kernels.device import log_once, on_cpu, triton_unavailable
from lrm_pl.kernels.linear import HiddenActivation
from lrm_pl.kernels.triplane import Axes, Reduce
from lrm_pl.rendering.deferred import autocast_state
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.ray_marching import Evaluate, RayBundle, RayMarching, march_rays

#: Default number of points that are decoded at a time. Compositing them takes about 0.5 GB.
_POINTS = 2**21

#: Maximum number of points per launch. The kernels use 32-bit offsets, and a point has 4 outputs.
_MOST_POINTS = 2**28

#: Maximum number of bytes of decoded samples that are saved for the backward pass.
SAVED_BYTES = 2**31


@runtime_checkable
class FusableField(Field, Protocol):
    """Triplane field with an MLP decoder, which may be rendered by the fused decoder."""

    axes: Axes
    reduce: Reduce
    hidden_activation: HiddenActivation

    def color(self, logits: Float[Tensor, "*points 3"]) -> Float[Tensor, "*points 3"]:
        """Map color logits to colors.

        Implementations must be pure functions.
        """


def is_fused(field: Field, device: torch.device) -> TypeGuard[FusableField]:
    """Return whether a field is rendered by the fused decoder.

    If the fused decoder is not used on an accelerator, the reason is logged once.
    """
    if on_cpu(device):
        return False
    reason = _unsupported_reason(field, device)
    if reason is not None:
        log_once("Rendering without the fused decoder: %s", reason)
    return reason is None


def _unsupported_reason(field: Field, device: torch.device) -> str | None:
    if not isinstance(field, FusableField):
        return "the field is not a triplane with an MLP"
    if field.reduce != "sum":
        return "the decoder's first layer is not folded into the planes (decoder.fold)"
    if (width := field.planes.shape[-1]) not in WIDTHS:
        return f"decoder.width is {width}, the kernels support {', '.join(map(str, WIDTHS))}"
    if torch.are_deterministic_algorithms_enabled():
        return "its gradients use atomic additions, and deterministic algorithms are enabled"
    if _compute_dtype(device) == torch.float16:
        return "float16 is not supported; use bfloat16 or float32"
    return triton_unavailable(device)


def _compute_dtype(device: torch.device) -> torch.dtype:
    """Return the autocast dtype, or float32 if autocast is disabled."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


class PixelGrid(NamedTuple):
    """Layout of the rays of an object and their division into chunks.

    Attributes:
        rows: Number N of pixel rows in all views.
        columns: Number W of pixel columns.
        samples: Number of samples per ray.
        chunk: Maximum number of points decoded at a time. If None, the maximum is 2^21. A chunk contains at least 4
            rows of pixels.
    """

    rows: int
    columns: int
    samples: int
    chunk: int | None

    @property
    def chunk_rows(self) -> int:
        """Number of pixel rows per chunk, a multiple of 4, which is the height of a tile."""
        return max(4, min(self.chunk or _POINTS, _MOST_POINTS) // (self.columns * self.samples) // 4 * 4)


class PixelRays:
    """Rays of B objects on grids of pixels, divided into chunks of rows.

    Args:
        bundle: Rays in the order of the pixels, row by row.
        grid: Layout of the R = N W rays.
    """

    def __init__(self, bundle: RayBundle, grid: PixelGrid) -> None:
        size = len(bundle.near), grid.rows, grid.columns
        self.origins, self.directions = (x.view(*size, 3) for x in (bundle.origins, bundle.directions))
        near, far = bundle.near.view(size), bundle.far.view(size)
        self.jitter = None if bundle.jitter is None else bundle.jitter.view(size)
        self.alive, self.grid = far > near, grid
        # If a ray misses the bounds, near and far can both be infinite, and their difference would be NaN.
        self.near, self.far = near.where(self.alive, 0), far.where(self.alive, 0)

    def for_each_chunk(self, work: Callable[[int, slice], None]) -> None:
        """Call ``work(object, rows)`` for every chunk."""
        for index, rays in enumerate(self.near):
            for start in range(0, len(rays), self.grid.chunk_rows):
                work(index, slice(start, start + self.grid.chunk_rows))

    def march(
        self,
        march: RayMarching,
        index: int,
        rows: slice,
        evaluate: Evaluate,
        activate: Callable[[Tensor], Tensor],
    ) -> Rendering:
        """March along the rays through a range of pixel rows of an object.

        Args:
            march: Ray marching settings.
            index: Index of the object.
            rows: Range of N pixel rows.
            evaluate: Function that evaluates the field at distances (N W, K) along the rays.
            activate: Function from raw densities to densities.
        """
        near, far = self.near[index, rows], self.far[index, rows].flatten()
        jitter = None if self.jitter is None else self.jitter[index, rows].flatten()
        return march_rays(march, near.flatten(), far, jitter, evaluate, activate).view(near.shape)

    def samples(self, index: int, rows: slice, t: Tensor) -> RaySamples:
        """Return samples at distances ``t`` along the rays through a range of pixel rows of an object."""
        origins, directions, alive = (x[index, rows] for x in (self.origins, self.directions, self.alive))
        return RaySamples(origins, directions, t.view(*alive.shape, -1), alive)


def render_fused(field: FusableField, rays: PixelRays, march: RayMarching) -> Rendering:
    """Render rays through the field of each object with the fused decoder.

    Returns:
        Pixels of shape (B, R). They are differentiable with respect to the planes and weights of the field, but not
        with respect to the rays.
    """
    saves = torch.is_grad_enabled()
    outputs = _Fused.apply(field, rays, march, saves, field.planes, *field.weights)
    return Rendering(*(pixels.flatten(1, 2) for pixels in outputs))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        field: FusableField,
        rays: PixelRays,
        march: RayMarching,
        saves: bool,
        planes: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.field, ctx.rays, ctx.march = field, rays, march
        ctx.save_for_backward(planes, *weights)
        ctx.autocast, ctx.dtype = autocast_state(planes.device.type), _compute_dtype(planes.device)
        ctx.saved = {}
        mlp, budget = pack(weights, ctx.dtype), SAVED_BYTES if saves else 0
        out = Rendering.zeros(rays.near.shape, planes)

        def render(index: int, rows: slice) -> None:
            nonlocal budget
            decoded: list[Tensor] = []
            texels = planes[index].to(ctx.dtype)

            def evaluate(t: Tensor) -> tuple[Tensor, Tensor]:
                decoded.append(_decode(field, rays, index, rows, texels, mlp, t))
                return _split(field, decoded[-1], t)

            out[index, rows] = rays.march(march, index, rows, evaluate, field.activate)
            budget -= sum(y.nbytes for y in decoded)
            if budget >= 0:
                ctx.saved[index, rows.start] = decoded

        rays.for_each_chunk(render)
        return out.rgb, out.opacity, out.depth

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        field: FusableField = ctx.field
        rays: PixelRays = ctx.rays
        planes, *weights = (tensor.detach() for tensor in ctx.saved_tensors)
        planes_grad, mlp = torch.zeros_like(planes), pack(weights, ctx.dtype)
        sums = PackedMLP(*(torch.zeros_like(x, dtype=torch.float32) for x in mlp))

        def differentiate(index: int, rows: slice) -> None:
            saved = ctx.saved.pop((index, rows.start), None)
            decoded: list[tuple[Tensor, Tensor]] = []  # distances, and decoder outputs as leaf tensors
            texels = planes[index].to(ctx.dtype)

            def evaluate(t: Tensor) -> tuple[Tensor, Tensor]:
                y = saved[len(decoded)] if saved else _decode(field, rays, index, rows, texels, mlp, t)
                leaf = y.detach().requires_grad_()
                decoded.append((t.detach(), leaf))
                return _split(field, leaf, t)

            with torch.enable_grad():
                pixels = rays.march(ctx.march, index, rows, evaluate, field.activate)
            leaf_grads = torch.autograd.grad(
                (pixels.rgb, pixels.opacity, pixels.depth),
                [leaf for _, leaf in decoded],
                [grad[index, rows] for grad in grads],
            )
            for (t, _), grad in zip(decoded, leaf_grads, strict=True):
                samples = rays.samples(index, rows, t)
                mlp_grads = accumulate_gradient(
                    planes_grad[index], grad, texels, samples, mlp, field.axes, field.hidden_activation
                )
                sums.weights.add_(mlp_grads.weights)
                sums.biases.add_(mlp_grads.biases)

        with ctx.autocast():
            rays.for_each_chunk(differentiate)
        weight_grads = (grad.contiguous() for grad in unpack(sums, planes.shape[-1]))
        return (None, None, None, None, planes_grad, *weight_grads)


def _decode(
    field: FusableField, rays: PixelRays, index: int, rows: slice, texels: Tensor, mlp: PackedMLP, t: Tensor
) -> Tensor:
    samples = rays.samples(index, rows, t)
    return decode_along_rays(texels, samples, mlp, field.axes, field.hidden_activation)


def _split(field: FusableField, decoded: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the raw densities (r, k) and colors (r, k, 3) of decoded samples."""
    return decoded[..., 0].view(t.shape), field.color(decoded[..., 1:]).view(*t.shape, 3)
