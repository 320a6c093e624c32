"""Bilinear triplane sampling.

``planes`` (P, S, S, C) are the channels-last float32 planes of one object, and ``points`` (Q, 3) are float32 points,
which are in [-1, 1] inside the field. Plane p is sampled at column ``points[:, axes[p][0]]`` and row
``points[:, axes[p][1]]``, with ``align_corners=False`` and zero padding, as in ``torch.nn.functional.grid_sample``. The
features of the planes are summed to (Q, C) if ``reduce`` is "sum", and concatenated to (Q, P * C) if it is "concat".
Sampling is differentiable with respect to the planes, but not the points.

On a CPU, sampling is implemented with numba. On other devices, ``embedding_bag`` gathers and sums the four neighbors of
a point in one kernel, and ``index_add_`` accumulates the gradients in place. The two implementations agree up to
float32 rounding. Gradients are bitwise reproducible on a CPU. On CUDA, they are reproducible with
``torch.use_deterministic_algorithms``, which ``grid_sample`` does not support.
"""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.kernels import triplane_numba
from lrm_pl.kernels.device import on_cpu

Reduce = Literal["sum", "concat"]
Axes = tuple[tuple[int, int], ...]


def triplane_sample_plain(
    planes: Float[Tensor, "P S S C"], points: Float[Tensor, "Q 3"], axes: Axes, reduce: Reduce
) -> Float[Tensor, "Q G"]:
    """Sample planes with ``grid_sample``. This is the reference implementation."""
    features = F.grid_sample(
        planes.permute(0, 3, 1, 2),
        _plane_coordinates(points, axes).transpose(0, 1).unsqueeze(2),
        align_corners=False,
        padding_mode="zeros",
    ).squeeze(-1)  # (P, C, Q)
    if reduce == "sum":
        return features.sum(dim=0).T
    return features.flatten(0, 1).T


def _plane_coordinates(points: Float[Tensor, "Q 3"], axes: Axes) -> Float[Tensor, "Q P 2"]:
    """Return the column and row coordinates of points in each plane.

    Slices are stacked because indexing with a list would copy the list to the device and synchronize.
    """
    columns, rows = (torch.stack([points[:, pair[k]] for pair in axes], dim=-1) for k in (0, 1))
    return torch.stack([columns, rows], dim=-1)


def _neighbors(
    points: Float[Tensor, "Q 3"], axes: Axes, side: int
) -> tuple[Int[Tensor, "Q P 4"], Float[Tensor, "Q P 4"]]:
    """Return the four texels around each point in each plane, and their bilinear weights.

    Texels are given as row indices into the planes reshaped to (P * S * S, C). Texels outside a plane have weight 0.
    """
    # Positions in texels are clamped to one texel beyond the border to avoid integer overflow.
    positions = (((_plane_coordinates(points, axes) + 1) * side - 1) / 2).clamp(-1, side)
    low = positions.floor()
    high_weight = positions - low
    pixels = torch.stack([low, low + 1], dim=-1)  # (Q, P, 2, 2): column and row, low and high
    weights = torch.stack([1 - high_weight, high_weight], dim=-1)
    weights = torch.where((pixels >= 0) & (pixels < side), weights, 0)
    pixels = pixels.int().clamp(0, side - 1)
    columns, rows = pixels.unbind(2)
    first = torch.arange(0, len(axes) * side, side, dtype=torch.int32, device=points.device)[:, None]
    index = (first + rows).unsqueeze(-1) * side + columns.unsqueeze(-2)  # (Q, P, 2, 2)
    column_weights, row_weights = weights.unbind(2)
    return index.flatten(2), (row_weights.unsqueeze(-1) * column_weights.unsqueeze(-2)).flatten(2)


def triplane_sample(
    planes: Float[Tensor, "P S S C"], points: Float[Tensor, "Q 3"], axes: Axes, reduce: Reduce
) -> Float[Tensor, "Q G"]:
    """Sample a triplane at points (see the module docstring).

    Raises:
        ValueError: The shapes or dtypes are invalid.
    """
    if planes.ndim != 4 or planes.shape[1] != planes.shape[2] or planes.shape[0] != len(axes):
        raise ValueError(f"expected planes of shape ({len(axes)}, S, S, C), but found {tuple(planes.shape)}")
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"expected points of shape (Q, 3), but found {tuple(points.shape)}")
    if planes.dtype != torch.float32 or points.dtype != torch.float32:
        raise ValueError(f"expected float32 planes and points, but found {planes.dtype} and {points.dtype}")
    flat = [axis for pair in axes for axis in pair]
    return torch.ops.lrm_pl.triplane_sample(
        planes.contiguous(), points.contiguous(), flat, reduce == "concat"
    )


def accumulate_gradient(
    total: Float[Tensor, "P S S C"],
    points: Float[Tensor, "Q 3"],
    grad: Float[Tensor, "Q G"],
    axes: Axes,
    reduce: Reduce,
) -> None:
    """Add the gradient of ``triplane_sample`` with respect to the planes to ``total`` in place."""
    flat = [axis for pair in axes for axis in pair]
    torch.ops.lrm_pl.triplane_accumulate(total, points, grad, flat, reduce == "concat")


@torch.library.custom_op("lrm_pl::triplane_accumulate", mutates_args=("total",))
def _accumulate_op(total: Tensor, points: Tensor, grad: Tensor, axes: list[int], concat: bool) -> None:
    pairs = tuple(zip(axes[::2], axes[1::2], strict=True))
    if on_cpu(total):
        triplane_numba.accumulate(
            total.numpy(),
            points.contiguous().numpy(),
            np.array(pairs, dtype=np.int64),
            concat,
            grad.float().contiguous().numpy(),
        )
        return
    rows, weights = _neighbors(points, pairs, total.shape[1])
    table = total.view(-1, total.shape[3])
    # The gradient of the features of each plane has shape (Q, P, C).
    groups = len(pairs) if concat else 1
    incoming = grad.float().reshape(len(points), groups, total.shape[3]).expand(-1, len(pairs), -1)
    for plane in range(len(pairs)):
        for k in range(4):  # one neighbor at a time, so that no temporary tensor is larger than the gradient
            table.index_add_(0, rows[:, plane, k], weights[:, plane, k, None] * incoming[:, plane])


@_accumulate_op.register_fake
def _(total: Tensor, points: Tensor, grad: Tensor, axes: list[int], concat: bool) -> None:
    pass


@torch.library.custom_op("lrm_pl::triplane_sample", mutates_args=())
def _op(planes: Tensor, points: Tensor, axes: list[int], concat: bool) -> Tensor:
    pairs = tuple(zip(axes[::2], axes[1::2], strict=True))
    if not on_cpu(planes):
        rows, weights = _neighbors(points, pairs, planes.shape[1])
        # A bag is a set of texels that are summed. It contains the neighbors of a point in all planes, or in one plane.
        bag = 4 if concat else 4 * len(pairs)
        return F.embedding_bag(
            rows.view(-1, bag),
            planes.view(-1, planes.shape[3]),
            mode="sum",
            per_sample_weights=weights.view(-1, bag),
        ).view(len(points), planes.shape[3] * (len(pairs) if concat else 1))
    out = planes.new_empty((points.shape[0], planes.shape[3] * (len(pairs) if concat else 1)))
    triplane_numba.sample(
        planes.detach().numpy(), points.detach().numpy(), np.array(pairs, dtype=np.int64), concat, out.numpy()
    )
    return out


@_op.register_fake
def _(planes: Tensor, points: Tensor, axes: list[int], concat: bool) -> Tensor:
    return planes.new_empty((points.shape[0], planes.shape[3] * (len(axes) // 2 if concat else 1)))


@torch.library.custom_op("lrm_pl::triplane_sample_backward", mutates_args=())
def _backward_op(grad: Tensor, planes: Tensor, points: Tensor, axes: list[int], concat: bool) -> Tensor:
    pairs = tuple(zip(axes[::2], axes[1::2], strict=True))
    total = torch.zeros_like(planes)
    accumulate_gradient(total, points, grad, pairs, "concat" if concat else "sum")
    return total


@_backward_op.register_fake
def _(grad: Tensor, planes: Tensor, points: Tensor, axes: list[int], concat: bool) -> Tensor:
    return torch.empty_like(planes)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, list[int], bool], output: Tensor
) -> None:
    planes, points, axes, concat = inputs
    ctx.save_for_backward(planes, points)
    ctx.axes, ctx.concat = axes, concat  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    planes, points = ctx.saved_tensors  # type: ignore[attr-defined]
    axes, concat = ctx.axes, ctx.concat  # type: ignore[attr-defined]
    gradient = torch.ops.lrm_pl.triplane_sample_backward(grad, planes, points, axes, concat)
    return gradient, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
