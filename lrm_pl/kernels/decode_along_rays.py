"""Fused Triton kernels for triplane sampling and evaluation of the NeRF MLP along rays.

The input ``planes`` (3, S, S, C) contains the channels-last planes of one object in bfloat16 or float32, with the first
layer of the MLP folded in. The weights and biases of the MLP are packed by ``pack``.

The features of a sample are the sum of the bilinear samples of the three planes (see ``kernels.triplane``) and a bias.
They pass through the activation, L linear layers of shape (C, C), each followed by the activation, and a linear layer
of shape (C, 4). The float32 output (N, W, K, 4) contains the raw density and three color logits of each sample, or
``EMPTY_RAW_DENSITY`` and zeros if the ray is not alive. Positions and interpolation are computed in float32. Matrix
products have the dtype of the planes and float32 accumulators. The output is differentiable with respect to the planes,
weights and biases, but not the rays.

The backward pass recomputes the layers, adds the gradient of the planes to a given tensor, and returns the gradients of
weights and biases. The gradient of the planes uses atomic additions and is not bitwise reproducible.
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

#: Raw density of empty samples. Every activation maps it to density 0, even after averaging with a large raw density.
EMPTY_RAW_DENSITY = -1e4

#: Supported widths C. At width 128, the backward kernel spills more than 1 KB per thread (tests/fused/build.py).
WIDTHS = (16, 32, 64)

#: Tile shapes (pixel rows, pixel columns, samples) by dtype of the planes. See ``plan_launch`` for the choice.
TILES = {torch.bfloat16: ((4, 4, 8), (4, 4, 4)), torch.float32: ((4, 4, 2),)}

#: Side of the window of texels whose gradients are summed over a tile at a time.
WINDOW = 8

NUM_WARPS = 8

Shapes = Sequence[torch.Size]

#: Number of columns of the last layer, padded to the minimum size of a tensor core product.
_LAST = 16


class PackedMLP(NamedTuple):
    """Weights of the MLP in the layout that the kernels require.

    Attributes:
        weights: Flat bfloat16 or float32 tensor of L matrices [in, out] of shape (C, C), followed by the last matrix of
            shape (C, 16), of which the first 4 columns are used.
        biases: Flat float32 tensor of L + 1 rows of C elements, followed by 16 elements for the last layer. The first
            row is the bias of the sampled features.
    """

    weights: Float[Tensor, " n"]
    biases: Float[Tensor, " m"]


class RaySamples(NamedTuple):
    """Samples along the rays through N rows of W pixels.

    Attributes:
        origins: Float32 ray origins.
        directions: Float32 unit directions of the rays.
        t: Float32 distances of K samples per ray.
        alive: Mask of the rays to evaluate.
    """

    origins: Float[Tensor, "N W 3"]
    directions: Float[Tensor, "N W 3"]
    t: Float[Tensor, "N W K"]
    alive: Bool[Tensor, "N W"]


def pack(weights: Sequence[Tensor], dtype: torch.dtype) -> PackedMLP:
    """Pack the weights of the MLP for the kernels.

    Args:
        weights: Bias of the sampled features, followed by the weight [out, in] and the bias of each layer.
        dtype: Dtype of the packed matrices.
    """
    first, *hidden, last, last_bias = (w.detach() for w in weights)
    wide = F.pad(last.t(), (0, _LAST - 4))
    matrices = torch.cat([*(w.t().reshape(-1) for w in hidden[::2]), wide.reshape(-1)])
    biases = torch.cat([first, *hidden[1::2], F.pad(last_bias, (0, _LAST - 4))])
    return PackedMLP(matrices.to(dtype).contiguous(), biases.float())


def unpack(packed: PackedMLP, width: int) -> tuple[Tensor, ...]:
    """Unpack packed weights or gradients into the arguments of ``pack``."""
    layers = (packed.biases.numel() - _LAST) // width - 1
    matrices = packed.weights[: layers * width * width].view(layers, width, width).transpose(1, 2)
    biases = packed.biases[: (layers + 1) * width].view(layers + 1, width)
    hidden = (x for pair in zip(matrices, biases[1:], strict=True) for x in pair)
    last = packed.weights[layers * width * width :].view(width, _LAST)[:, :4].t()
    return (biases[0], *hidden, last, packed.biases[(layers + 1) * width :][:4])


def decode_along_rays_plain(
    planes: Float[Tensor, "3 S S C"], samples: RaySamples, mlp: PackedMLP, axes: Axes, act: HiddenActivation
) -> Float[Tensor, "N W K 4"]:
    """Compute ``decode_along_rays`` with PyTorch operators.

    This is the reference implementation, which is also used if the Triton kernels cannot run.
    """
    origins, directions, t, alive = samples
    points = origins.unsqueeze(-2) + t.unsqueeze(-1) * directions.unsqueeze(-2)
    dtype = planes.dtype
    bias, *hidden, last, last_bias = unpack(mlp, planes.shape[-1])
    x = activation(triplane_sample_plain(planes.float(), points.view(-1, 3), axes, "sum") + bias, act)
    for weight, layer_bias in zip(hidden[::2], hidden[1::2], strict=True):
        x = activation(_product(x, weight, dtype) + layer_bias, act)
    y = _product(x, last, dtype) + last_bias
    empty = y.new_tensor([EMPTY_RAW_DENSITY, 0.0, 0.0, 0.0])
    return torch.where(alive[..., None, None], y.view(*t.shape, 4), empty)


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round two matrices to a dtype, and multiply them in float32."""
    return x.to(dtype).float() @ weight.to(dtype).float().t()


def decode_along_rays(
    planes: Float[Tensor, "3 S S C"], samples: RaySamples, mlp: PackedMLP, axes: Axes, act: HiddenActivation
) -> Float[Tensor, "N W K 4"]:
    """Evaluate the field at samples along rays without an autograd graph (see the module docstring).

    Raises:
        ValueError: The shapes or dtypes are invalid.
    """
    _check(planes, samples, mlp)
    if triton_unavailable(planes.device) is not None:
        with torch.no_grad():
            return decode_along_rays_plain(planes, samples, mlp, axes, act)
    flat = [axis for pair in axes for axis in pair]
    return torch.ops.lrm_pl.decode_along_rays(planes, samples, mlp, flat, act == "silu")


def accumulate_gradient(
    total: Float[Tensor, "3 S S C"],
    grad: Float[Tensor, "N W K 4"],
    planes: Float[Tensor, "3 S S C"],
    samples: RaySamples,
    mlp: PackedMLP,
    axes: Axes,
    act: HiddenActivation,
) -> PackedMLP:
    """Add the gradient of ``decode_along_rays`` with respect to the planes to ``total`` in place.

    Args:
        total: Contiguous float32 gradient of the planes, which is modified in place.
        grad: Gradient of the output.
        planes: Planes of the object.
        samples: Samples along rays.
        mlp: Packed weights.
        axes: Column axis and row axis of each plane.
        act: Activation between the layers.

    Returns:
        Packed float32 gradients of weights and biases.

    Raises:
        ValueError: The shapes or dtypes are invalid, or ``total`` is not contiguous.
    """
    _check(planes, samples, mlp)
    if total.dtype != torch.float32 or not total.is_contiguous():
        raise ValueError(
            f"expected a contiguous float32 total, but found {total.dtype} with strides {total.stride()}"
        )
    if triton_unavailable(planes.device) is not None:
        leaves = [x.detach().requires_grad_() for x in (planes, *mlp)]
        with torch.enable_grad():
            mlp = PackedMLP(*leaves[1:])
            out = decode_along_rays_plain(leaves[0], samples, mlp, axes, act)
        planes_grad, *sums = torch.autograd.grad(out, leaves, grad)
        total += planes_grad
        return PackedMLP(*(x.float() for x in sums))
    flat = [axis for pair in axes for axis in pair]
    sums = torch.ops.lrm_pl.decode_along_rays_backward(total, grad, planes, samples, mlp, flat, act == "silu")
    return PackedMLP(*sums)


def _check(planes: Tensor, samples: RaySamples, mlp: PackedMLP) -> None:
    origins, _, t, alive = samples
    if planes.ndim != 4 or planes.shape[0] != 3 or planes.shape[1] != planes.shape[2]:
        raise ValueError(f"expected planes of shape (3, S, S, C), but found {tuple(planes.shape)}")
    if planes.dtype not in (torch.bfloat16, torch.float32) or mlp.weights.dtype != planes.dtype:
        raise ValueError(
            f"expected planes and weights that are both bfloat16 or both float32, but found {planes.dtype} planes "
            f"and {mlp.weights.dtype} weights"
        )
    if t.dtype != torch.float32 or origins.dtype != torch.float32:
        raise ValueError(f"expected float32 origins and t, but found {origins.dtype} and {t.dtype}")
    if t.shape[:2] != origins.shape[:2] or alive.shape != t.shape[:2]:
        raise ValueError(
            "expected origins (N, W, 3), t (N, W, K) and alive (N, W) of matching shapes, but found "
            f"{tuple(origins.shape)}, {tuple(t.shape)} and {tuple(alive.shape)}"
        )


@dataclasses.dataclass(frozen=True)
class Launch:
    """Launch configuration of the kernels.

    Attributes:
        tile: Pixel rows, pixel columns and samples of a tile.
        tiles: Number of tiles.
        programs: Number of programs.
        layers: Number L of hidden layers.
        width: Width C of the hidden layers.
        dtype: Dtype of the planes.
    """

    tile: tuple[int, int, int]
    tiles: int
    programs: int
    layers: int
    width: int
    dtype: torch.dtype

    @property
    def scratch(self) -> int:
        """Size in bytes of the scratch buffer, in which the backward kernel stores pre-activations."""
        return self.programs * (self.layers + 1) * math.prod(self.tile) * self.width * self.dtype.itemsize


def plan_launch(planes: Tensor, t: Tensor, biases: Tensor, gpu: GpuProperties) -> Launch:
    """Choose the largest tile for which the scratch buffer takes less than a quarter of the L2 cache.

    Each multiprocessor runs at most one program. If no tile is small enough, as on RTX 30xx, A10, A40, A30 and MI300X,
    the smallest tile is chosen.

    Args:
        planes: Planes of shape (3, S, S, C).
        t: Sample distances of shape (N, W, K).
        biases: Packed biases.
        gpu: Properties of the GPU.
    """
    width, dtype = planes.shape[3], planes.dtype
    layers = (biases.numel() - _LAST) // width - 1
    for tile in TILES[dtype]:
        tiles = math.prod(-(-size // part) for size, part in zip(t.shape, tile, strict=True))
        launch = Launch(tile, tiles, min(gpu.multiprocessors, tiles), layers, width, dtype)
        if 4 * launch.scratch < gpu.l2:
            break
    return launch


def _launch(
    planes: Tensor, samples: list[Tensor], mlp: list[Tensor]
) -> tuple[Launch, list[Tensor], dict[str, object]]:
    """Return a launch configuration, and the tensors and sizes that both kernels take as arguments."""
    gpu = gpu_properties(planes.device)
    assert gpu is not None, planes.device
    *rays, t, alive = samples
    launch = plan_launch(planes, t, mlp[1], gpu)
    rows, columns, tile_samples = launch.tile
    tensors = [x.contiguous() for x in (*rays, t, alive.to(torch.int8), *mlp)]
    return launch, tensors, {
        "N": t.shape[0], "W": t.shape[1], "K": t.shape[2], "S": planes.shape[1], "C": launch.width,
        "L": launch.layers, "TH": rows, "TW": columns, "TK": tile_samples, "HALF": planes.dtype == torch.bfloat16,
        "num_warps": NUM_WARPS, "num_stages": 1,
    }  # fmt: skip


@torch.library.custom_op("lrm_pl::decode_along_rays", mutates_args=())
def _op(planes: Tensor, samples: list[Tensor], mlp: list[Tensor], axes: list[int], silu: bool) -> Tensor:
    from lrm_pl.kernels import decode_along_rays_triton as kernels

    launch, tensors, sizes = _launch(planes, samples, mlp)
    out = samples[2].new_empty(*samples[2].shape, 4)
    with launch_guard(planes.device):
        kernels.forward[(launch.programs,)](
            planes.contiguous(), *tensors, out, launch.tiles,
            AXES=tuple(axes), SILU=silu, EMPTY_RAW_DENSITY=EMPTY_RAW_DENSITY, **sizes,
        )  # fmt: skip
    return out


@torch.library.custom_op("lrm_pl::decode_along_rays_backward", mutates_args=("total",))
def _backward_op(
    total: Tensor,
    grad: Tensor,
    planes: Tensor,
    samples: list[Tensor],
    mlp: list[Tensor],
    axes: list[int],
    silu: bool,
) -> tuple[Tensor, Tensor]:
    from lrm_pl.kernels import decode_along_rays_triton as kernels

    launch, tensors, sizes = _launch(planes, samples, mlp)
    weight_sums, bias_sums = (mlp[1].new_zeros(launch.programs, x.numel()) for x in mlp)
    scratch = planes.new_empty(launch.scratch // planes.dtype.itemsize)
    with launch_guard(planes.device):
        kernels.backward[(launch.programs,)](
            planes.contiguous(), total, *tensors, grad.contiguous(), weight_sums, bias_sums, scratch, launch.tiles,
            AXES=tuple(axes), SILU=silu, WINDOW=WINDOW, **sizes,
        )  # fmt: skip
    return weight_sums.sum(0), bias_sums.sum(0)


@_op.register_fake
def _(planes: Tensor, samples: list[Tensor], mlp: list[Tensor], axes: list[int], silu: bool) -> Tensor:
    return samples[2].new_empty(*samples[2].shape, 4)


@_backward_op.register_fake
def _(
    total: Tensor, grad: Tensor, planes: Tensor, samples: object, mlp: list[Tensor], *_: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mlp[0], dtype=torch.float32), torch.empty_like(mlp[1])


# Each sample passes through L hidden layers and the last layer, which has 4 columns.
@register_flop_formula(torch.ops.lrm_pl.decode_along_rays)
def _(planes: torch.Size, samples: Shapes, mlp: Shapes, *_: object, **__: object) -> int:
    return samples[2].numel() * _flops_per_sample(planes[3], mlp[1])


# The backward pass recomputes the layers and computes the gradients of inputs and weights. Each of these three steps
# costs as much as the forward pass. A product with the bilinear weights sums the gradients of the planes per window.
@register_flop_formula(torch.ops.lrm_pl.decode_along_rays_backward)
def _(
    total: torch.Size, grad: torch.Size, planes: torch.Size, samples: Shapes, mlp: Shapes, *_: object, **__: object
) -> int:  # fmt: skip
    return samples[2].numel() * (3 * _flops_per_sample(planes[3], mlp[1]) + 2 * 3 * WINDOW**2 * planes[3])


def _flops_per_sample(width: int, biases: torch.Size) -> int:
    layers = (biases.numel() - _LAST) // width - 1
    return 2 * width * (layers * width + 4)
