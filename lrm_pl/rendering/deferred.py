"""Deferred back-propagation, which renders in a single autograd operation (ARF, Zhang et al. 2022, section 4.2).

The forward pass renders chunks of rays without a graph. The backward pass renders each chunk again with a graph of this
chunk only, and accumulates the gradient of the planes in place. Memory is therefore independent of the number of rays,
chunks fit in the cache, and DDP, FSDP2, DeepSpeed and gradient accumulation need no special handling.
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
from lrm_pl.rendering.ray_marching import RayMarching, march_rays


def render_deferred(
    field: Field,
    origins: Float[Tensor, "B R 3"],
    directions: Float[Tensor, "B R 3"],
    near: Float[Tensor, "B R"],
    far: Float[Tensor, "B R"],
    jitter: Float[Tensor, "B R"] | None,
    march: RayMarching,
    chunk: int,
) -> Rendering:
    """Render rays through the field of each object.

    Args:
        field: Fields of B objects.
        origins: Ray origins. Row b contains the rays of all views of object b.
        directions: Unit directions of the rays.
        near: Distance at which the interval of each ray starts.
        far: Distance at which the interval of each ray ends. Rays with far <= near are empty and are not evaluated.
        jitter: Positions of the samples in their bins, in [0, 1). If None, samples are at bin centers.
        march: Ray marching settings.
        chunk: Maximum number of points decoded at a time.

    Returns:
        Pixels of shape (B, R). They are differentiable with respect to the planes and weights of the field, but not
        the rays.
    """
    return render_rays(
        field, Rays(origins, directions, near, far, jitter, max(1, chunk // march.samples)), march
    )


def render_rays(field: Field, rays: "Rays", march: RayMarching) -> Rendering:
    """Render rays that are already divided into chunks (see ``render_deferred``)."""
    rgb, opacity, depth = _Deferred.apply(field, rays, march, field.planes, *field.weights)
    return Rendering(rgb, opacity, depth)


def render_plain(
    field: Field,
    origins: Float[Tensor, "B R 3"],
    directions: Float[Tensor, "B R 3"],
    near: Float[Tensor, "B R"],
    far: Float[Tensor, "B R"],
    jitter: Float[Tensor, "B R"] | None,
    march: RayMarching,
) -> Rendering:
    """Render with one ordinary autograd graph, as the reference implementation of ``render_deferred``."""
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
        pixels = march_rays(march, near[index, hit], far[index, hit], noise, evaluate, field.activate)
        empty = Rendering(*(near.new_zeros(size) for size in ((*hit.shape, 3), hit.shape, hit.shape)))
        objects.append(
            [a.index_put((hit,), b) for a, b in zip(vars(empty).values(), vars(pixels).values(), strict=True)]
        )
    return Rendering(*(torch.stack(parts) for parts in zip(*objects, strict=True)))


class Rays:
    """Rays of B objects, divided into chunks that fit in the cache."""

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
        # On a CPU, each thread processes whole chunks because their tensors are too small for intra-op parallelism.
        self.threads = num_threads(near.device)
        self.chunks = [self._split(row.nonzero().squeeze(-1), rays_per_chunk) for row in far > near]

    def _split(self, rays: Tensor, max_rays: int) -> tuple[Tensor, ...]:
        """Split ray indices into equal chunks of at most ``max_rays`` rays.

        Each thread gets the same number of chunks.
        """
        rounds = math.ceil(len(rays) / (max_rays * self.threads))
        return rays.tensor_split(max(1, rounds) * self.threads)

    def points(self, index: int, rays: Tensor, t: Tensor) -> Tensor:
        """Return the points (r k, 3) at distances ``t`` (r, k) along rays of an object."""
        origins, directions = (
            self.origins[index, rays].unsqueeze(-2),
            self.directions[index, rays].unsqueeze(-2),
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

        jitter = None if self.jitter is None else self.jitter[index, rays]
        return march_rays(march, self.near[index, rays], self.far[index, rays], jitter, evaluate, activate)

    def for_each_chunk(
        self,
        work: Callable[[int, int, Tensor], None],
        finish: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Call ``work(thread, object, rays)`` for every chunk, and ``finish(thread, object)`` after each object.

        Thread k of T threads processes the chunks k, k + T, ... of every object. The threads are started only once for
        all objects because the calling thread would otherwise start parallel operations between objects, after which
        idle OpenMP threads spin and occupy the cores.
        """

        def run(thread: int) -> None:
            for index, chunks in enumerate(self.chunks):
                for rays in chunks[thread :: self.threads]:
                    if len(rays):
                        work(thread, index, rays)
                finish(thread, index)

        if self.threads == 1:
            run(0)
            return

        def run_alone(thread: int) -> None:
            with autocast(), torch.inference_mode(inference), torch.set_grad_enabled(False):
                run(thread)

        # Autocast, gradient and inference modes are thread-local, so each thread has to set the modes of the caller.
        autocast, inference = autocast_state(self.near.device.type), torch.is_inference_mode_enabled()
        run_threads(self.threads, run_alone)


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
        """Record that a thread has finished an object.

        When the last thread has finished, the buffers of the object are summed and freed.
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
        shape = rays.near.shape
        rgb, opacity, depth = (planes.new_zeros(size) for size in ((*shape, 3), shape, shape))

        def render(_: int, index: int, numbers: Tensor) -> None:
            def decode(points: Tensor) -> tuple[Tensor, Tensor]:
                return field.decode(field.sample(planes[index], points), weights)

            pixels = rays.march(march, index, numbers, decode, field.activate)
            rgb[index, numbers], opacity[index, numbers] = pixels.rgb, pixels.opacity
            depth[index, numbers] = pixels.depth

        rays.for_each_chunk(render)
        return rgb, opacity, depth

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
        return (
            None,
            None,
            None,
            plane_grad,
            *(sum(parts[1:], start=parts[0]) for parts in zip(*weight_grads, strict=True)),
        )


def autocast_state(device: str) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """Return a function that creates contexts with the current autocast state.

    The contexts restore the state in the backward pass and in other threads.
    """
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype, enabled=True) if enabled else contextlib.nullcontext()
