"""Deferred back-propagation, which renders in a single autograd operation (ARF, Zhang et al. 2022, section 4.2).

The forward pass renders chunks of rays without an autograd graph. The backward pass renders each chunk again with a
graph of this chunk only, and accumulates the gradient of the planes in place. The memory usage is therefore independent
of the number of rays, chunks fit in the cache, and DDP, FSDP2, DeepSpeed and gradient accumulation need no special
handling.
"""

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrm_pl.kernels.device import num_threads
from lrm_pl.kernels.threads import run_threads
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.ray_marching import RayBundle, RayMarching, march_rays


def render_deferred(field: Field, rays: "Rays", march: RayMarching) -> Rendering:
    """Render rays through the field of each object.

    Args:
        field: Fields of B objects.
        rays: Rays of B objects.
        march: Ray marching settings.

    Returns:
        Pixels of shape (B, R). They are differentiable with respect to the planes and weights of the field, but not
        with respect to the rays.
    """
    rgb, opacity, depth = _Deferred.apply(field, rays, march, field.planes, *field.weights)
    return Rendering(rgb, opacity, depth)


def render_plain(field: Field, rays: RayBundle, march: RayMarching) -> Rendering:
    """Render with one ordinary autograd graph. This is the reference implementation of ``render_deferred``."""
    near, far = rays.near, rays.far
    objects = []
    for index in range(len(near)):
        hit = far[index] > near[index]
        start, along = rays.origins[index, hit].unsqueeze(-2), rays.directions[index, hit].unsqueeze(-2)

        def evaluate(
            t: Tensor, index: int = index, start: Tensor = start, along: Tensor = along
        ) -> tuple[Tensor, Tensor]:
            features = field.sample(field.planes[index], (start + t.unsqueeze(-1) * along).reshape(-1, 3))
            raw, rgb = field.decode(features, field.weights)
            return raw.view(t.shape), rgb.view(*t.shape, 3)

        noise = None if rays.jitter is None else rays.jitter[index, hit]
        pixels = march_rays(march, near[index, hit], far[index, hit], noise, evaluate, field.activate)
        empty = Rendering.zeros(hit.shape, near)
        objects.append(
            [a.index_put((hit,), b) for a, b in zip(vars(empty).values(), vars(pixels).values(), strict=True)]
        )
    return Rendering(*(torch.stack(parts) for parts in zip(*objects, strict=True)))


class Rays:
    """Rays of B objects, divided into chunks that fit in the cache.

    Args:
        bundle: The rays.
        max_points: Maximum number of points decoded at a time.
        samples: Number of samples per ray.
    """

    def __init__(self, bundle: RayBundle, max_points: int, samples: int) -> None:
        self.bundle = bundle
        # On a CPU, each thread processes whole chunks because their tensors are too small for intra-op parallelism.
        self.threads = num_threads(bundle.near.device)
        max_rays = max(1, max_points // samples)
        self.chunks = [self._split(row.nonzero().squeeze(-1), max_rays) for row in bundle.far > bundle.near]

    def _split(self, rays: Tensor, max_rays: int) -> tuple[Tensor, ...]:
        """Split ray indices into equal chunks of at most ``max_rays`` rays.

        Each thread processes the same number of chunks.
        """
        rounds = math.ceil(len(rays) / (max_rays * self.threads))
        return rays.tensor_split(max(1, rounds) * self.threads)

    def points(self, index: int, rays: Tensor, t: Tensor) -> Tensor:
        """Return the points (r k, 3) at distances ``t`` (r, k) along rays of an object."""
        origins, directions = (
            x[index, rays].unsqueeze(-2) for x in (self.bundle.origins, self.bundle.directions)
        )
        return torch.addcmul(origins, directions, t.unsqueeze(-1)).view(-1, 3)

    def march(
        self,
        march: RayMarching,
        index: int,
        rays: Tensor,
        decode: Callable[[Tensor], tuple[Tensor, Tensor]],
        activate: Callable[[Tensor], Tensor],
    ) -> Rendering:
        """March along rays of an object.

        Args:
            march: Ray marching settings.
            index: Index of the object.
            rays: Indices of the rays.
            decode: Function from points (q, 3) to raw densities and colors.
            activate: Function from raw densities to densities.
        """

        def evaluate(t: Tensor) -> tuple[Tensor, Tensor]:
            raw, rgb = decode(self.points(index, rays, t))
            return raw.view(t.shape), rgb.view(*t.shape, 3)

        near, far, jitter = self.bundle.near, self.bundle.far, self.bundle.jitter
        noise = None if jitter is None else jitter[index, rays]
        return march_rays(march, near[index, rays], far[index, rays], noise, evaluate, activate)

    def for_each_chunk(
        self, work: Callable[[int, int, Tensor], None], finish: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Call ``work(thread, object, rays)`` for every chunk, and ``finish(thread, object)`` after each object.

        Thread k of T threads processes the chunks k, k + T, ... of every object. The threads are started only once for
        all objects because the calling thread would otherwise start parallel operations between objects, after which
        idle OpenMP threads spin and occupy the cores.
        """
        autocast = autocast_state(self.bundle.near.device.type)  # thread-local

        def run(thread: int) -> None:
            with autocast():
                for index, chunks in enumerate(self.chunks):
                    for rays in chunks[thread :: self.threads]:
                        if len(rays):
                            work(thread, index, rays)
                    finish(thread, index)

        run_threads(self.threads, run)


class _PlaneGradients:
    """Gradients of the planes of each object, accumulated in one buffer per thread.

    The buffers are summed in a fixed order, so the result is bitwise reproducible on a CPU.

    Args:
        result: Output of shape (B, ...), which is overwritten completely.
        threads: Number of threads.
    """

    def __init__(self, result: Tensor, threads: int) -> None:
        self.result, self.threads = result, threads
        self._partials: list[dict[int, Tensor]] = [{} for _ in range(result.shape[0])]
        self._lock = threading.Lock()
        self._finished = [0] * result.shape[0]

    def partial(self, thread: int, index: int) -> Tensor:
        """Return the buffer in which a thread accumulates the gradient of an object."""
        if thread not in self._partials[index]:
            self._partials[index][thread] = torch.zeros_like(self.result[index])
        return self._partials[index][thread]

    def finish(self, thread: int, index: int) -> None:
        """Record that a thread has processed all chunks of an object.

        After the last thread, the buffers of the object are summed and freed.
        """
        with self._lock:
            self._finished[index] += 1
            last = self._finished[index] == self.threads
        if last:
            partials, self._partials[index] = self._partials[index], {}
            self.result[index] = 0  # an object without rays in its bounds has no buffers
            for k in sorted(partials):
                self.result[index] += partials[k]


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        field: Field,
        rays: Rays,
        march: RayMarching,
        planes: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.field, ctx.rays, ctx.march = field, rays, march
        ctx.save_for_backward(planes, *weights)
        ctx.autocast = autocast_state(planes.device.type)
        out = Rendering.zeros(rays.bundle.near.shape, planes)

        def render(_: int, index: int, numbers: Tensor) -> None:
            def decode(points: Tensor) -> tuple[Tensor, Tensor]:
                return field.decode(field.sample(planes[index], points), weights)

            out[index, numbers] = rays.march(march, index, numbers, decode, field.activate)

        rays.for_each_chunk(render)
        return out.rgb, out.opacity, out.depth

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        field, rays, march = ctx.field, ctx.rays, ctx.march
        planes, *saved = (tensor.detach() for tensor in ctx.saved_tensors)
        plane_grad = torch.empty_like(planes)
        plane_sums = _PlaneGradients(plane_grad, rays.threads)
        # Each thread has its own leaf tensors and sums.
        weights = [[w.detach().requires_grad_() for w in saved] for _ in range(rays.threads)]
        weight_grads = [[torch.zeros_like(w) for w in saved] for _ in range(rays.threads)]

        def differentiate(thread: int, index: int, numbers: Tensor) -> None:
            sampled: list[tuple[Tensor, Tensor]] = []  # points, and their features as leaf tensors

            def decode(points: Tensor) -> tuple[Tensor, Tensor]:
                with torch.no_grad():
                    features = field.sample(planes[index], points)
                sampled.append((points, features.requires_grad_()))
                return field.decode(features, tuple(weights[thread]))

            with torch.enable_grad():
                pixels = rays.march(march, index, numbers, decode, field.activate)
            chunk_grads = torch.autograd.grad(
                (pixels.rgb, pixels.opacity, pixels.depth),
                (*weights[thread], *(features for _, features in sampled)),
                [grad[index, numbers] for grad in grads],
            )
            for total, part in zip(weight_grads[thread], chunk_grads, strict=False):
                total += part
            for (points, _), grad in zip(sampled, chunk_grads[len(saved) :], strict=True):
                field.accumulate(plane_sums.partial(thread, index), points, grad)

        with ctx.autocast():
            rays.for_each_chunk(differentiate, plane_sums.finish)
        sums = (sum(parts[1:], start=parts[0]) for parts in zip(*weight_grads, strict=True))
        return (None, None, None, plane_grad, *sums)


def autocast_state(device: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """Return a function that creates context managers for the current autocast state.

    The context managers restore the state in the backward pass and in other threads. They do not cache converted
    weights because all threads share one cache, and the order in which gradients are added would depend on the timing.
    """
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    if not enabled:
        return contextlib.nullcontext
    return lambda: torch.autocast(device, dtype, cache_enabled=False)
