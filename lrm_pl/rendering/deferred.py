"""Rendering as ONE operation for autograd: deferred back-propagation (ARF, Zhang et al. 2022, section 4.2).

Forward runs ray chunk by ray chunk without a graph. Backward runs the chunks again, each with a small graph of its
own, adds into one gradient of the planes in place, and returns every gradient once. So memory does not grow with
the rendered area, chunks fit the cache, and DDP, FSDP2, DeepSpeed and accumulation see an ordinary operation.
"""

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.kernels.device import num_threads
from lrm_pl.kernels.threads import run_threads
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.ray_marching import March, march_rays


def render_deferred(
    field: Field,
    origins: Float[Tensor, "B R 3"],
    directions: Float[Tensor, "B R 3"],
    near: Float[Tensor, "B R"],
    far: Float[Tensor, "B R"],
    jitter: Float[Tensor, "B R"] | None,
    march: March,
    chunk: int,
) -> Rendering:
    """Render rays through the field of each object.

    Args:
        field: The objects' fields.
        origins: Ray origins; all rays of all views of object b in row b.
        directions: Unit directions.
        near: Start of each ray's interval.
        far: End of each ray's interval; rays with far <= near see nothing and cost nothing.
        jitter: Position of the samples in their bins, None for the middle.
        march: The walk along a ray.
        chunk: Points decoded at a time, at most.

    Returns:
        Pixels with rays of shape (B, R). Differentiable in the field's planes and weights, not in the rays.
    """
    return render_rays(
        field, Rays(origins, directions, near, far, jitter, max(1, chunk // march.samples)), march
    )


def render_rays(field: Field, rays: "Rays", march: March) -> Rendering:
    """Render rays that know how they are walked; see ``render_deferred``."""
    rgb, opacity, depth = _Deferred.apply(field, rays, march, field.planes, *field.weights)
    return Rendering(rgb, opacity, depth)


def render_plain(
    field: Field,
    origins: Float[Tensor, "B R 3"],
    directions: Float[Tensor, "B R 3"],
    near: Float[Tensor, "B R"],
    far: Float[Tensor, "B R"],
    jitter: Float[Tensor, "B R"] | None,
    march: March,
) -> Rendering:
    """Render as one ordinary graph: the slow, obvious twin of ``render_deferred``."""
    objects = []
    for index in range(origins.shape[0]):
        hit = far[index] > near[index]
        start, along = origins[index, hit].unsqueeze(-2), directions[index, hit].unsqueeze(-2)

        def evaluate(
            t: Tensor, index: int = index, start: Tensor = start, along: Tensor = along
        ) -> tuple[Tensor, Tensor]:
            features = field.sample(field.planes[index], (start + t.unsqueeze(-1) * along).reshape(-1, 3))
            raw, rgb = field.decode(features, field.weights)
            return raw.view(t.shape), rgb.view(*t.shape, 3)

        noise = None if jitter is None else jitter[index, hit]
        seen = march_rays(march, near[index, hit], far[index, hit], noise, evaluate, field.activate)
        whole = Rendering(*(near.new_zeros(size) for size in ((*hit.shape, 3), hit.shape, hit.shape)))
        objects.append(
            [a.index_put((hit,), b) for a, b in zip(vars(whole).values(), vars(seen).values(), strict=True)]
        )
    return Rendering(*(torch.stack(parts) for parts in zip(*objects, strict=True)))


class Rays:
    """The rays of a call, and their walk in chunks that fit the cache; holds no graph."""

    def __init__(
        self,
        origins: Tensor,
        directions: Tensor,
        near: Tensor,
        far: Tensor,
        jitter: Tensor | None,
        rays_per_chunk: int,
    ) -> None:
        self.origins, self.directions, self.near, self.far = origins, directions, near, far
        self.jitter = jitter
        # On a CPU each thread takes whole chunks of its own: their tensors are too small to share among threads.
        self.threads = num_threads(near.device)
        self.chunks = [self._split(row.nonzero().squeeze(-1), rays_per_chunk) for row in far > near]

    def _split(self, rays: Tensor, most: int) -> tuple[Tensor, ...]:
        """Cut the ray numbers of an object into equal chunks of at most ``most``, as many for each thread."""
        rounds = math.ceil(len(rays) / (most * self.threads))
        return rays.tensor_split(max(1, rounds) * self.threads)

    def points(self, index: int, rays: Tensor, t: Tensor) -> Tensor:
        """Return the points (r k, 3) at distances t (r, k) along some rays of an object."""
        origins, directions = (
            self.origins[index, rays].unsqueeze(-2),
            self.directions[index, rays].unsqueeze(-2),
        )
        return torch.addcmul(origins, directions, t.unsqueeze(-1)).view(-1, 3)

    def march(
        self,
        march: March,
        index: int,
        rays: Tensor,
        read: Callable[[Tensor], tuple[Tensor, Tensor]],
        activate: Callable[[Tensor], Tensor],
    ) -> Rendering:
        """Walk along some rays of an object; ``read`` decodes points (q, 3)."""

        def evaluate(t: Tensor) -> tuple[Tensor, Tensor]:
            raw, rgb = read(self.points(index, rays, t))
            return raw.view(t.shape), rgb.view(*t.shape, 3)

        jitter = None if self.jitter is None else self.jitter[index, rays]
        return march_rays(march, self.near[index, rays], self.far[index, rays], jitter, evaluate, activate)

    def for_each_chunk(
        self, work: Callable[[int, int, Tensor], None], done: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Call ``work(thread, object, rays)`` for every chunk, and ``done(thread, object)`` after an object's last.

        Thread k takes the chunks k, k + T, ... of every object. All objects are walked in one go: between two
        parallel operations of the calling thread, OpenMP's own idle threads spin, and take the cores away.
        """

        def run(thread: int) -> None:
            for index, chunks in enumerate(self.chunks):
                for rays in chunks[thread :: self.threads]:
                    if len(rays):
                        work(thread, index, rays)
                done(thread, index)

        if self.threads == 1:
            run(0)
            return

        def run_alone(thread: int) -> None:
            with autocast(), torch.inference_mode(inference), torch.set_grad_enabled(False):
                run(thread)

        # Autocast, gradient and inference modes belong to a thread: hand the caller's on.
        autocast, inference = autocast_state(self.near.device.type), torch.is_inference_mode_enabled()
        run_threads(self.threads, run_alone)


class _Sums:
    """Plane gradients of each object, added up over threads in a fixed order: on a CPU runs repeat bit for bit.

    Args:
        result: (B, ...) where the sums go; all of it is overwritten.
        threads: Number of threads.
    """

    def __init__(self, result: Tensor, threads: int) -> None:
        self.result, self.threads = result, threads
        self._parts: list[dict[int, Tensor]] = [{} for _ in range(result.shape[0])]
        self._lock = threading.Lock()
        self._finished = [0] * result.shape[0]

    def part(self, thread: int, index: int) -> Tensor:
        """Return what a thread adds into for an object."""
        if thread not in self._parts[index]:
            self._parts[index][thread] = torch.zeros_like(self.result[index])
        return self._parts[index][thread]

    def done(self, thread: int, index: int) -> None:
        """Say that a thread has finished an object; the last one adds the parts up and frees them."""
        with self._lock:
            self._finished[index] += 1
            last = self._finished[index] == self.threads
        if last:
            parts, self._parts[index] = self._parts[index], {}
            self.result[index] = 0  # an object that no ray hits has no parts
            for k in sorted(parts):
                self.result[index] += parts[k]


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        field: Field,
        rays: Rays,
        march: March,
        planes: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.field, ctx.rays, ctx.march = field, rays, march
        ctx.save_for_backward(planes, *weights)
        ctx.autocast = autocast_state(planes.device.type)
        shape = rays.near.shape
        rgb, opacity, depth = (planes.new_zeros(size) for size in ((*shape, 3), shape, shape))

        def render(_: int, index: int, numbers: Tensor) -> None:
            def read(points: Tensor) -> tuple[Tensor, Tensor]:
                return field.decode(field.sample(planes[index], points), weights)

            pixels = rays.march(march, index, numbers, read, field.activate)
            rgb[index, numbers], opacity[index, numbers] = pixels.rgb, pixels.opacity
            depth[index, numbers] = pixels.depth

        rays.for_each_chunk(render)
        return rgb, opacity, depth

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        field, rays, march = ctx.field, ctx.rays, ctx.march
        planes, *saved = (tensor.detach() for tensor in ctx.saved_tensors)
        plane_grad = torch.empty_like(planes)
        planes_sums = _Sums(plane_grad, rays.threads)
        # Each thread has leaves and sums of its own.
        weights = [[w.detach().requires_grad_() for w in saved] for _ in range(rays.threads)]
        weight_grads = [[torch.zeros_like(w) for w in saved] for _ in range(rays.threads)]

        def differentiate(thread: int, index: int, numbers: Tensor) -> None:
            sampled: list[tuple[Tensor, Tensor]] = []  # points, and their features as leaves

            def read(points: Tensor) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    features = field.sample(planes[index], points)
                sampled.append((points, features.requires_grad_()))
                return field.decode(features, tuple(weights[thread]))

            with torch.enable_grad():
                pixels = rays.march(march, index, numbers, read, field.activate)
            chunk_grads = torch.autograd.grad(
                (pixels.rgb, pixels.opacity, pixels.depth),
                (*weights[thread], *(features for _, features in sampled)),
                [grad[index, numbers] for grad in grads],
            )
            for total, part in zip(weight_grads[thread], chunk_grads, strict=False):
                total += part
            for (points, _), grad in zip(sampled, chunk_grads[len(saved) :], strict=True):
                field.accumulate(planes_sums.part(thread, index), points, grad)

        with ctx.autocast():
            rays.for_each_chunk(differentiate, planes_sums.done)
        return (
            None,
            None,
            None,
            plane_grad,
            *(sum(parts[1:], start=parts[0]) for parts in zip(*weight_grads, strict=True)),
        )


def autocast_state(device: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """Remember the autocast state of now, to enter it again in backward and in other threads."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled=True) if enabled else contextlib.nullcontext()
