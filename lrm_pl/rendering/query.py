"""Ask a field at points, without gradients: in chunks that fit the cache, a thread to each."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.kernels.device import num_threads, points_per_chunk
from lrm_pl.kernels.threads import run_threads
from lrm_pl.rendering.deferred import autocast_state
from lrm_pl.rendering.field import Field


def query_density(field: Field, index: int, points: Float[Tensor, "Q 3"]) -> Float[Tensor, " Q"]:
    """Return the densities of one object at points."""
    density = points.new_empty(len(points))

    def work(start: int, chunk: Tensor) -> None:
        density[start : start + len(chunk)] = field.activate(_decode(field, index, chunk)[0])

    _for_each_chunk(points, work)
    return density


def query_color(field: Field, index: int, points: Float[Tensor, "Q 3"]) -> Float[Tensor, "Q 3"]:
    """Return the colors of one object at points."""
    color = torch.empty_like(points)

    def work(start: int, chunk: Tensor) -> None:
        color[start : start + len(chunk)] = _decode(field, index, chunk)[1]

    _for_each_chunk(points, work)
    return color


def _decode(field: Field, index: int, points: Tensor) -> tuple[Tensor, Tensor]:
    return field.decode(field.sample(field.planes[index], points), field.weights)


def _for_each_chunk(points: Tensor, work: Callable[[int, Tensor], None]) -> None:
    size = points_per_chunk(points.device)
    chunks = [(start, points[start : start + size]) for start in range(0, len(points), size)]
    threads = min(num_threads(points.device), len(chunks))
    if threads <= 1:
        with torch.no_grad():
            for start, chunk in chunks:
                work(start, chunk)
        return
    # Autocast and inference modes belong to a thread: hand the caller's on.
    autocast, inference = autocast_state(points.device.type), torch.is_inference_mode_enabled()

    def run(thread: int) -> None:
        with autocast(), torch.inference_mode(inference), torch.no_grad():
            for start, chunk in chunks[thread::threads]:
                work(start, chunk)

    run_threads(threads, run)
