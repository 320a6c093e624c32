"""Densities on a regular lattice over [-1, 1]^3, coarse to fine: what a surface is cut out of. No gradients.

LRM asks 384^3 points. A surface passes through few of their cells: the lattice is read at every fourth point first,
and in full only near cells that have a corner below the threshold and one above a hundredth of it. What is thinner
than four points and falls off as sharply as that may be lost; where nothing at all is found, every point is read.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.rendering.field import Field
from lrm_pl.rendering.query import query_density

#: Every so-manieth point of the lattice is read first.
_STEP = 4

#: A corner with this share of the threshold hints at a surface in its cells.
_HINT = 0.01


@dataclasses.dataclass(frozen=True)
class DensityGrid:
    """Densities of one object.

    Attributes:
        density: (X, Y, Z), from -1 to 1 along each axis, both included.
        asked: How many points the field was asked for.
    """

    density: Float[Tensor, "X Y Z"]
    asked: int


@torch.no_grad()
def density_grid(
    field: Field, index: int, resolution: int = 384, threshold: float | None = None
) -> DensityGrid:
    """Read the densities of one object on a lattice.

    Args:
        field: The fields.
        index: Which object.
        resolution: Points along each axis.
        threshold: Density whose surface is wanted: points far from it get the density of a point near them. None
            reads every point.
    """
    axis = torch.linspace(-1, 1, resolution, device=field.planes.device)
    if threshold is None or resolution <= 2 * _STEP:
        density = query_density(field, index, _lattice(axis, axis, axis))
        return DensityGrid(density.view(resolution, resolution, resolution), density.numel())
    some = axis[torch.arange(0, resolution + _STEP - 1, _STEP).clamp_max(resolution - 1)]
    coarse = query_density(field, index, _lattice(some, some, some)).view(len(some), len(some), len(some))
    wanted = _expanded(_crossed_cells(coarse, threshold), resolution).nonzero()  # the one wait for a GPU
    if not len(wanted):
        return density_grid(field, index, resolution)
    density = _expanded(coarse[:-1, :-1, :-1], resolution)
    density[wanted.unbind(-1)] = query_density(field, index, axis[wanted])
    return DensityGrid(density, coarse.numel() + len(wanted))


def _lattice(x: Tensor, y: Tensor, z: Tensor) -> Float[Tensor, "Q 3"]:
    return torch.stack(torch.meshgrid(x, y, z, indexing="ij"), dim=-1).view(-1, 3)


def _crossed_cells(corners: Float[Tensor, "X Y Z"], threshold: float) -> Bool[Tensor, "x y z"]:
    """Find cells that the surface may pass through, and their neighbors."""
    below, some = (
        (corners <= threshold).float()[None, None],
        (corners > _HINT * threshold).float()[None, None],
    )
    crossed = F.max_pool3d(below, 2, 1) * F.max_pool3d(some, 2, 1)
    return F.max_pool3d(crossed, 3, 1, padding=1)[0, 0] > 0


def _expanded(cells: Tensor, resolution: int) -> Tensor:
    """Give every point of the lattice what its cell has; the last points belong to the last cells."""
    numbers = torch.arange(resolution, device=cells.device) // _STEP
    for axis in range(3):
        cells = cells.index_select(axis, numbers.clamp_max(cells.shape[axis] - 1))
    return cells
