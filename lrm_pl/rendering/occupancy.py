"""Which cells of [-1, 1]^3 hold anything at all: for images that pass over empty space. No gradients."""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.kernels.device import on_cpu
from lrm_pl.kernels.occupancy_numba import occupied
from lrm_pl.rendering.density_grid import density_grid
from lrm_pl.rendering.field import Field

#: A density that cannot be seen: over the longest way through the box, 3.5 units, its opacity is a fifth of 1/255.
_UNSEEN = 2e-4

#: Points of the lattice that are read, in units of cells, along each axis.
_POINTS_A_CELL = 2


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Cells of one object's box.

    Attributes:
        cells: Whether a cell, or one of its neighbors, holds a density that can be seen.
    """

    cells: Bool[Tensor, "n n n"]

    @property
    def share(self) -> float:
        """How much of the box is occupied."""
        return self.cells.float().mean().item()

    def occupied(
        self, points: Float[Tensor, "Q 3"], among: Bool[Tensor, " Q"] | None = None
    ) -> Int[Tensor, " occupied"]:
        """Return the numbers of the points that lie in occupied cells, in ascending order.

        Args:
            points: The points.
            among: Which of them may be returned; None for all.
        """
        if on_cpu(points) and among is None:
            return torch.from_numpy(occupied(self.cells.numpy(), points.numpy()))
        size = len(self.cells)
        x, y, z = ((points + 1) * (size / 2)).long().clamp(0, size - 1).unbind(-1)
        found = self.cells[x, y, z]
        return (found if among is None else found & among).nonzero().squeeze(-1)


@torch.no_grad()
def measure_occupancy(field: Field, index: int, cells: int = 64, unseen: float = _UNSEEN) -> Occupancy:
    """Find the occupied cells of one object.

    Args:
        field: The fields.
        index: Which object.
        cells: Cells along each axis.
        unseen: Densities up to this one count as nothing, where lengths are scene units.
    """
    seen = density_grid(field, index, _POINTS_A_CELL * cells + 1).density > unseen
    # A cell has its own points, those on its faces among them, and one cell of margin on each side.
    margin = _POINTS_A_CELL
    padded = F.pad(seen.float()[None, None], (margin,) * 6)
    filled = F.max_pool3d(padded, 3 * _POINTS_A_CELL + 1, stride=_POINTS_A_CELL)
    return Occupancy(filled[0, 0] > 0)
