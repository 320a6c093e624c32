"""Triplane sampling and the NeRF MLP as one operation along rays: the contract, the plain twin, and the Triton body.

The contract. ``planes`` (3, S, S, C), channels last, of ONE object, with the MLP's first layer folded in, bfloat16 or
float32; ``origins`` and ``directions`` (N, W, 3) of N rows of W pixels, ``t`` (N, W, K) distances of samples, float32;
``alive`` (N, W), whether a ray is evaluated at all. ``weights`` and ``biases`` are those of ``pack``. The features of a
sample are the sum of the three planes' bilinear samples (see ``kernels.triplane``); features + bias go through the
activation, through L layers C x C with the activation, and through one layer C x 4. Returns (N, W, K, 4) float32: raw
density and three color logits; of rays that are not alive ``NOTHING`` and zeros. Positions and interpolation are
float32, products in the type of the planes with float32 sums. Differentiable in planes, weights and biases, not in the
rays.

Backward recomputes the layers, adds to a given gradient of the planes, and returns those of weights and biases. The sum
over tiles in the planes' gradient is made by atomic additions, so it does not repeat bit for bit.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from lrm_pl.kernels.device import GpuProperties, gpu_properties, launch_guard, triton_unavailable
from lrm_pl.kernels.linear import HiddenActivation, activation
from lrm_pl.kernels.triplane import Axes, triplane_sample_plain

#: Raw density of rays that are not evaluated: no activation makes anything of it, even averaged with a large one.
NOTHING = -1e4

#: Widths C that the kernels are used at: at 128 backward spills more than 1 KB a thread (tests/fused/build.py).
WIDTHS = (16, 32, 64)

#: Pixels x pixels x samples of a tile, by the planes' type; the first whose scratch fits is used.
TILES = {torch.bfloat16: ((4, 4, 8), (4, 4, 4)), torch.float32: ((4, 4, 2),)}

#: Texels x texels of a plane for which a tile's gradients are summed at a time.
WINDOW = 8

NUM_WARPS = 8

#: Columns of the last layer: the smallest product that tensor cores do.
_LAST = 16


class PackedMLP(NamedTuple):
    """Weights of the MLP as the kernels read them.

    Attributes:
        weights: L matrices (C, C) as [in, out], then (C, 16), of which the first 4 columns are used; flat, bfloat16 or
            float32.
        biases: L + 1 rows of C, the first for the sampled features, then 16; flat, float32.
    """

    weights: Float[Tensor, " n"]
    biases: Float[Tensor, " m"]


def pack(weights: Sequence[Tensor], dtype: torch.dtype) -> PackedMLP:
    """Pack (bias, W_1, b_1, ..., W_L, b_L, W (4, C), b (4)), the matrices as [out, in], for the kernels."""
    first, *hidden, last, last_bias = (w.detach() for w in weights)
    wide = F.pad(last.t(), (0, _LAST - 4))
    matrices = torch.cat([*(w.t().reshape(-1) for w in hidden[::2]), wide.reshape(-1)])
    biases = torch.cat([first, *hidden[1::2], F.pad(last_bias, (0, _LAST - 4))])
    return PackedMLP(matrices.to(dtype).contiguous(), biases.float())


def unpack(packed: PackedMLP, width: int) -> tuple[Tensor, ...]:
    """Undo ``pack``: of weights, or of their gradients."""
    layers = (packed.biases.numel() - _LAST) // width - 1
    matrices = packed.weights[: layers * width * width].view(layers, width, width).transpose(1, 2)
    biases = packed.biases[: (layers + 1) * width].view(layers + 1, width)
    hidden = (x for pair in zip(matrices, biases[1:], strict=True) for x in pair)
    last = packed.weights[layers * width * width :].view(width, _LAST)[:, :4].t()
    return (biases[0], *hidden, last, packed.biases[(layers + 1) * width :][:4])


def decode_along_rays_plain(
    planes: Float[Tensor, "3 S S C"],
    origins: Float[Tensor, "N W 3"],
    directions: Float[Tensor, "N W 3"],
    t: Float[Tensor, "N W K"],
    alive: Bool[Tensor, "N W"],
    mlp: PackedMLP,
    axes: Axes,
    act: HiddenActivation,
) -> Float[Tensor, "N W K 4"]:
    """Compute it with ordinary operators: the twin, and the body where there is no Triton."""
    points = origins.unsqueeze(-2) + t.unsqueeze(-1) * directions.unsqueeze(-2)
    dtype = planes.dtype
    bias, *hidden, last, last_bias = unpack(mlp, planes.shape[-1])
    x = activation(triplane_sample_plain(planes.float(), points.view(-1, 3), axes, "sum") + bias, act)
    for weight, layer_bias in zip(hidden[::2], hidden[1::2], strict=True):
        x = activation(_product(x, weight, dtype) + layer_bias, act)
    y = _product(x, last, dtype) + last_bias
    nothing = y.new_tensor([NOTHING, 0.0, 0.0, 0.0])
    return torch.where(alive[..., None, None], y.view(*t.shape, 4), nothing)


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to a type, then multiply with float32 sums."""
    return x.to(dtype).float() @ weight.to(dtype).float().t()


def decode_along_rays(
    planes: Float[Tensor, "3 S S C"],
    origins: Float[Tensor, "N W 3"],
    directions: Float[Tensor, "N W 3"],
    t: Float[Tensor, "N W K"],
    alive: Bool[Tensor, "N W"],
    mlp: PackedMLP,
    axes: Axes,
    act: HiddenActivation,
) -> Float[Tensor, "N W K 4"]:
    """Evaluate the field at samples along rays; see the contract at the top of this file. It records no graph.

    Raises:
        ValueError: Wrong shapes or types.
    """
    _check(planes, origins, t, alive, mlp)
    if triton_unavailable(planes.device) is not None:
        with torch.no_grad():
            return decode_along_rays_plain(planes, origins, directions, t, alive, mlp, axes, act)
    flat = [axis for pair in axes for axis in pair]
    return torch.ops.lrm_pl.decode_along_rays(
        planes, origins, directions, t, alive, *mlp, flat, act == "silu"
    )


def accumulate_gradient(
    total: Float[Tensor, "3 S S C"],
    grad: Float[Tensor, "N W K 4"],
    planes: Float[Tensor, "3 S S C"],
    origins: Float[Tensor, "N W 3"],
    directions: Float[Tensor, "N W 3"],
    t: Float[Tensor, "N W K"],
    alive: Bool[Tensor, "N W"],
    mlp: PackedMLP,
    axes: Axes,
    act: HiddenActivation,
) -> PackedMLP:
    """Add the planes' gradient of ``decode_along_rays`` to ``total`` (float32).

    Args:
        total: What is added to, in place.
        grad: Gradient of the output.
        planes: As in ``decode_along_rays``, and all that follow.
        origins: Ray origins.
        directions: Unit directions.
        t: Distances.
        alive: Which rays were evaluated.
        mlp: Weights.
        axes: Axes of the planes.
        act: Activation.

    Returns:
        The gradients of weights and biases, float32, packed as these are.
    """
    _check(planes, origins, t, alive, mlp)
    if total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(
            f"expected a contiguous float32 total, but found {total.dtype} of strides {total.stride()}"
        )
    if triton_unavailable(planes.device) is not None:
        leaves = [x.detach().requires_grad_() for x in (planes, *mlp)]
        with torch.enable_grad():
            mlp = PackedMLP(*leaves[1:])
            out = decode_along_rays_plain(leaves[0], origins, directions, t, alive, mlp, axes, act)
        planes_grad, *sums = torch.autograd.grad(out, leaves, grad)
        total += planes_grad
        return PackedMLP(*(x.float() for x in sums))
    flat = [axis for pair in axes for axis in pair]
    return PackedMLP(
        *torch.ops.lrm_pl.decode_along_rays_backward(
            total, grad, planes, origins, directions, t, alive, *mlp, flat, act == "silu"
        )
    )


def _check(planes: Tensor, origins: Tensor, t: Tensor, alive: Tensor, mlp: PackedMLP) -> None:
    if planes.ndim != 4 or planes.shape[0] != 3 or planes.shape[1] != planes.shape[2]:
        raise ValueError(f"expected planes (3, S, S, C), but found {tuple(planes.shape)}")
    if planes.dtype not in (torch.bfloat16, torch.float32) or mlp.weights.dtype != planes.dtype:
        raise ValueError(
            f"expected planes and weights both bfloat16 or both float32, but found {planes.dtype} and "
            f"{mlp.weights.dtype}"
        )
    if t.dtype != torch.float32 or origins.dtype != torch.float32:
        raise ValueError(f"expected float32 rays, but found {origins.dtype} and {t.dtype}")
    if t.shape[:2] != origins.shape[:2] or alive.shape != t.shape[:2]:
        raise ValueError(
            f"expected rays of one shape, but found {tuple(origins.shape)}, {tuple(t.shape)} and {tuple(alive.shape)}"
        )


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the kernels are launched for rays and planes of some size.

    Attributes:
        tile: Rows, columns and samples of a tile.
        tiles: How many tiles.
        programs: How many programs process them.
        layers: L.
        width: C.
        dtype: Type of the planes.
    """

    tile: tuple[int, int, int]
    tiles: int
    programs: int
    layers: int
    width: int
    dtype: torch.dtype

    @property
    def scratch(self) -> int:
        """Bytes of pre-activations that all programs together write and read again, in the L2 cache."""
        return self.programs * (self.layers + 1) * math.prod(self.tile) * self.width * self.dtype.itemsize


def plan_launch(planes: Tensor, t: Tensor, biases: Tensor, gpu: GpuProperties) -> Launch:
    """Choose the tile: the largest whose scratch, of one program per multiprocessor, stays below a quarter of the L2.

    Where none does (RTX 30xx, A10, A40, A30, MI300X), the smallest: fewer programs would leave multiprocessors idle.

    Args:
        planes: (3, S, S, C).
        t: (N, W, K).
        biases: Packed biases.
        gpu: What it runs on.
    """
    width, dtype = planes.shape[3], planes.dtype
    layers = (biases.numel() - _LAST) // width - 1
    for tile in TILES[dtype]:
        tiles = math.prod(-(-size // part) for size, part in zip(t.shape, tile, strict=True))
        launch = Launch(tile, tiles, min(gpu.multiprocessors, tiles), layers, width, dtype)
        if 4 * launch.scratch < gpu.l2:
            break
    return launch


def _launch(planes: Tensor, t: Tensor, biases: Tensor) -> tuple[Launch, dict[str, object]]:
    """Return a launch and the kernels' sizes."""
    gpu = gpu_properties(planes.device)
    assert gpu is not None, planes.device
    launch = plan_launch(planes, t, biases, gpu)
    rows, columns, samples = launch.tile
    return launch, {
        "N": t.shape[0], "W": t.shape[1], "K": t.shape[2], "S": planes.shape[1], "C": launch.width,
        "L": launch.layers, "TH": rows, "TW": columns, "TK": samples, "HALF": planes.dtype == torch.bfloat16,
        "num_warps": NUM_WARPS, "num_stages": 1,
    }  # fmt: skip


@torch.library.custom_op("lrm_pl::decode_along_rays", mutates_args=())
def _op(
    planes: Tensor,
    origins: Tensor,
    directions: Tensor,
    t: Tensor,
    alive: Tensor,
    weights: Tensor,
    biases: Tensor,
    axes: list[int],
    silu: bool,
) -> Tensor:
    from lrm_pl.kernels import decode_along_rays_triton as kernels

    launch, sizes = _launch(planes, t, biases)
    out = t.new_empty(*t.shape, 4)
    with launch_guard(planes.device):
        kernels.forward[(launch.programs,)](
            *(x.contiguous() for x in (planes, origins, directions, t, alive.to(torch.int8), weights, biases)),
            out, launch.tiles, AXES=tuple(axes), SILU=silu, NOTHING=NOTHING, **sizes,
        )  # fmt: skip
    return out


@torch.library.custom_op("lrm_pl::decode_along_rays_backward", mutates_args=("total",))
def _backward_op(
    total: Tensor,
    grad: Tensor,
    planes: Tensor,
    origins: Tensor,
    directions: Tensor,
    t: Tensor,
    alive: Tensor,
    weights: Tensor,
    biases: Tensor,
    axes: list[int],
    silu: bool,
) -> tuple[Tensor, Tensor]:
    from lrm_pl.kernels import decode_along_rays_triton as kernels

    launch, sizes = _launch(planes, t, biases)
    weight_sums = biases.new_zeros(launch.programs, weights.numel())
    bias_sums = biases.new_zeros(launch.programs, biases.numel())
    scratch = planes.new_empty(launch.scratch // planes.dtype.itemsize)
    with launch_guard(planes.device):
        kernels.backward[(launch.programs,)](
            planes.contiguous(), total,
            *(x.contiguous() for x in (origins, directions, t, alive.to(torch.int8), weights, biases, grad)),
            weight_sums, bias_sums, scratch, launch.tiles, AXES=tuple(axes), SILU=silu, WINDOW=WINDOW, **sizes,
        )  # fmt: skip
    return weight_sums.sum(0), bias_sums.sum(0)


@_op.register_fake
def _(
    planes: Tensor, origins: Tensor, directions: Tensor, t: Tensor, alive: Tensor, weights: Tensor, biases: Tensor,
    axes: list[int], silu: bool,
) -> Tensor:  # fmt: skip
    return t.new_empty(*t.shape, 4)


@_backward_op.register_fake
def _(
    total: Tensor, grad: Tensor, planes: Tensor, origins: Tensor, directions: Tensor, t: Tensor, alive: Tensor,
    weights: Tensor, biases: Tensor, axes: list[int], silu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(weights, dtype=torch.float32), torch.empty_like(biases)


# Triton's launches are nothing that PyTorch's counter sees. Per sample: L layers and the last one, of 4 columns.
@register_flop_formula(torch.ops.lrm_pl.decode_along_rays)
def _(
    planes: torch.Size, origins: torch.Size, directions: torch.Size, t: torch.Size, alive: torch.Size,
    weights: torch.Size, biases: torch.Size, *_: object, **__: object,
) -> int:  # fmt: skip
    return t.numel() * _flops_per_sample(planes[3], biases)


# Backward recomputes the layers; the gradients of inputs and of weights cost as much each; then a product with the
# bilinear weights sums the planes' gradients window by window.
@register_flop_formula(torch.ops.lrm_pl.decode_along_rays_backward)
def _(
    total: torch.Size, grad: torch.Size, planes: torch.Size, origins: torch.Size, directions: torch.Size,
    t: torch.Size, alive: torch.Size, weights: torch.Size, biases: torch.Size, *_: object, **__: object,
) -> int:  # fmt: skip
    return t.numel() * (3 * _flops_per_sample(planes[3], biases) + 2 * 3 * WINDOW**2 * planes[3])


def _flops_per_sample(width: int, biases: torch.Size) -> int:
    layers = (biases.numel() - _LAST) // width - 1
    return 2 * width * (layers * width + 4)
