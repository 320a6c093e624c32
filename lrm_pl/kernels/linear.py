"""Fused linear layer and activation for inference on a CPU.

The operation computes act(x W^T + b) for ``x`` (Q, I), ``weight`` (O, I) and ``bias`` (O), where the activation is ReLU
or SiLU. The fused operator is part of oneDNN, and ``torch.compile`` also uses it on a CPU. It applies the activation in
registers, is not differentiable, and agrees with ``linear_plain`` up to bf16 rounding.
"""

import functools
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from lrm_pl.kernels.device import on_cpu

HiddenActivation = Literal["relu", "silu"]

#: Whether this build of PyTorch has the fused linear layers of oneDNN.
_BUILT = hasattr(torch.ops.mkldnn, "_linear_pointwise")

#: Names of the activations in oneDNN.
_NAMES: dict[HiddenActivation, str] = {"relu": "relu", "silu": "swish"}


def activation(x: Tensor, act: HiddenActivation) -> Tensor:
    """Apply the activation with a given name."""
    return F.relu(x) if act == "relu" else F.silu(x)


def linear_plain(
    x: Float[Tensor, "Q I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"], act: HiddenActivation
) -> Float[Tensor, "Q O"]:
    """Compute a linear layer and its activation with differentiable PyTorch operators."""
    return activation(F.linear(x, weight, bias), act)


def linear_activated(
    x: Float[Tensor, "Q I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"], act: HiddenActivation
) -> Float[Tensor, "Q O"]:
    """Compute a linear layer and its activation, with the fused operator if possible (see the module docstring)."""
    fused = (
        type(x) is Tensor  # not a subclass such as a fake tensor
        and x.dtype == torch.bfloat16
        and on_cpu(x)
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.enabled
        and _bf16_supported()
    )
    if not fused:
        return linear_plain(x, weight, bias, act)
    return torch.ops.mkldnn._linear_pointwise(x, weight.to(x.dtype), bias.to(x.dtype), _NAMES[act], [], "")


@functools.cache
def _bf16_supported() -> bool:
    """Return whether oneDNN supports bf16 on this processor, which requires AVX-512."""
    return _BUILT and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * x.numel() * weight[0]


if _BUILT:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
