"""Layer normalization with a weight and bias per object.

The operation computes LN(x) * weight + bias for ``x`` of shape (B, L, D), and ``weight`` and ``bias`` of shape (B, D).
It normalizes over D and is differentiable with respect to all three tensors. The only large tensor that is saved for
the backward pass is ``x``. The Triton kernels compute in float32. They read ``x`` once in the forward pass, and ``x``
and the gradient once in the backward pass. Sums have a fixed order, so results are bitwise reproducible.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.kernels.device import gpu_properties, launch_guard, on_cpu, triton_unavailable

#: Maximum width of a row, which a program of the kernels holds in registers.
_WIDEST = 4096


def modulated_norm_plain(
    x: Float[Tensor, "B L D"], weight: Float[Tensor, "B D"], bias: Float[Tensor, "B D"], eps: float
) -> Float[Tensor, "B L D"]:
    """Compute one layer norm per object.

    This is the reference implementation, which is also used if the Triton kernels cannot run.
    """
    # The gradient of indexing would allocate a tensor of zeros of the full size for each object.
    objects = zip(x.unbind(0), weight.unbind(0), bias.unbind(0), strict=True)
    return torch.stack([F.layer_norm(one, one.shape[-1:], w, b, eps) for one, w, b in objects])


def modulated_norm(
    x: Float[Tensor, "B L D"], weight: Float[Tensor, "B D"], bias: Float[Tensor, "B D"], eps: float
) -> Float[Tensor, "B L D"]:
    """Normalize tokens with a weight and bias per object (see the module docstring)."""
    fused = (
        not on_cpu(x)
        and x.dtype == weight.dtype == bias.dtype == torch.float32
        and x.shape[2] <= _WIDEST
        and triton_unavailable(x.device) is None
    )
    if not fused:
        return modulated_norm_plain(x, weight, bias, eps)
    return torch.ops.lrm_pl.modulated_norm(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)[0]


def _sizes(x: Tensor) -> dict[str, int]:
    """Return the size arguments of the kernels."""
    block = 1 << (x.shape[2] - 1).bit_length()
    return {"L": x.shape[1], "D": x.shape[2], "BLOCK": block, "num_warps": min(8, max(1, block // 256))}


@torch.library.custom_op("lrm_pl::modulated_norm", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from lrm_pl.kernels import modulated_norm_triton as kernels

    out, mean, rstd = torch.empty_like(x), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])
    with launch_guard(x.device):
        kernels.forward[(mean.numel(),)](x, weight, bias, out, mean, rstd, eps=eps, **_sizes(x))
    return out, mean, rstd


@torch.library.custom_op("lrm_pl::modulated_norm_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from lrm_pl.kernels import modulated_norm_triton as kernels

    gpu = gpu_properties(x.device)
    assert gpu is not None, x.device
    batch, length, dim = x.shape
    # Four programs per multiprocessor hide memory latency. Their partial sums take 1% of the memory of x.
    programs = min(length, max(1, 4 * gpu.multiprocessors // batch))
    out, sums = torch.empty_like(x), x.new_empty(2, batch, programs, dim)
    with launch_guard(x.device):
        kernels.backward[(programs, batch)](
            grad.contiguous(), x, weight, mean, rstd, out, sums[0], sums[1], **_sizes(x)
        )
    return out, sums[0].sum(1), sums[1].sum(1)


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, float],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    x, weight, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, None]:
    gradients = torch.ops.lrm_pl.modulated_norm_backward(grad, *ctx.saved_tensors)  # type: ignore[attr-defined]
    return (*gradients, None)


_op.register_autograd(_backward, setup_context=_setup_context)
