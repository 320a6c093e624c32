"""Queries of a field at points and on regular grids over [-1, 1]^3, without gradients.

LRM extracts meshes from grids of 384^3 points. The surface crosses only a few cells of the grid, so the field is first
evaluated at every fourth point along each axis, and then at all points of the coarse cells that the surface may cross.
A coarse cell is refined if the cell or a neighbor has both a corner below the threshold and a corner above 1% of the
threshold. Features that are thinner than four grid spacings and have a sharp density falloff may be missed. If no cell
qualifies, the whole grid is evaluated.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.kernels.device import num_threads, points_per_chunk
from lrm_pl.kernels.threads import run_threads
from lrm_pl.rendering.deferred import autocast_state
from lrm_pl.rendering.field import Field

#: Stride of the coarse grid, in points.
_STRIDE = 4

#: Fraction of the threshold above which the density at a corner indicates a nearby surface.
_HINT = 0.01


@torch.no_grad()
def density_grid(
    field: Field, index: int, resolution: int = 384, threshold: float | None = None
) -> Float[Tensor, "X Y Z"]:
    """Evaluate the density of one object on a regular grid.

    Args:
        field: Fields of B objects.
        index: Index of the object.
        resolution: Number of points along each axis.
        threshold: Density of the surface of interest. Points far from the surface are assigned the density of a nearby
            point. If None, every point is evaluated.

    Returns:
        Densities at points from -1 to 1 inclusive along each axis.
    """
    axis = torch.linspace(-1, 1, resolution, device=field.planes.device)
    if threshold is None or resolution <= 2 * _STRIDE:
        return query_density(field, index, _grid_points(axis)).view((resolution,) * 3)
    coarse_axis = axis[torch.arange(0, resolution + _STRIDE - 1, _STRIDE).clamp_max(resolution - 1)]
    coarse = query_density(field, index, _grid_points(coarse_axis)).view((len(coarse_axis),) * 3)
    fine = _upsample(_crossed_cells(coarse, threshold), resolution).nonzero()  # synchronizes with the GPU
    if not len(fine):
        return density_grid(field, index, resolution)
    density = _upsample(coarse[:-1, :-1, :-1], resolution)
    density[fine.unbind(-1)] = query_density(field, index, axis[fine])
    return density


def query_density(field: Field, index: int, points: Float[Tensor, "Q 3"]) -> Float[Tensor, " Q"]:
    """Return the densities of one object at the given points."""
    density = points.new_empty(len(points))

    def work(chunk: slice) -> None:
        density[chunk] = field.activate(_decode(field, index, points[chunk])[0])

    _for_each_chunk(points, work)
    return density


def query_color(field: Field, index: int, points: Float[Tensor, "Q 3"]) -> Float[Tensor, "Q 3"]:
    """Return the colors of one object at the given points."""
    color = torch.empty_like(points)

    def work(chunk: slice) -> None:
        color[chunk] = _decode(field, index, points[chunk])[1]

    _for_each_chunk(points, work)
    return color


def _grid_points(axis: Float[Tensor, " n"]) -> Float[Tensor, "Q 3"]:
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(-1, 3)


def _crossed_cells(corners: Float[Tensor, "X Y Z"], threshold: float) -> Bool[Tensor, "x y z"]:
    """Return a mask of the cells that the surface may cross, dilated by one cell."""
    below = (corners <= threshold).float()[None, None]
    above = (corners > _HINT * threshold).float()[None, None]
    crossed = F.max_pool3d(below, 2, 1) * F.max_pool3d(above, 2, 1)
    return F.max_pool3d(crossed, 3, 1, padding=1)[0, 0] > 0


def _upsample(cells: Tensor, resolution: int) -> Tensor:
    """Assign to each grid point the value of its coarse cell.

    Points beyond the last cell are assigned the value of the last cell.
    """
    index = torch.arange(resolution, device=cells.device) // _STRIDE
    for axis in range(3):
        cells = cells.index_select(axis, index.clamp_max(cells.shape[axis] - 1))
    return cells


def _decode(field: Field, index: int, points: Tensor) -> tuple[Tensor, Tensor]:
    return field.decode(field.sample(field.planes[index], points), field.weights)


def _for_each_chunk(points: Tensor, work: Callable[[slice], None]) -> None:
    """Call ``work`` for chunks of points that fit in the cache, distributed over threads on a CPU."""
    size = points_per_chunk(points.device)
    chunks = [slice(start, start + size) for start in range(0, len(points), size)]
    threads = max(1, min(num_threads(points.device), len(chunks)))
    autocast = autocast_state(points.device.type)

    def run(thread: int) -> None:
        with autocast():
            for chunk in chunks[thread::threads]:
                work(chunk)

    run_threads(threads, run)
