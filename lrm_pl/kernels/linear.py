"""A linear layer and its activation at once: the contract, the plain twin, and a CPU's body.

The contract. act(x W^T + b) for ``x`` (Q, I), ``weight`` (O, I), ``bias`` (O), act ReLU or SiLU; under autocast in its
type. The body is oneDNN's, the one that ``torch.compile`` chooses on a CPU: the activation is applied to a product
while it is still in registers, which takes a fifth (SiLU) to a quarter (ReLU) off a layer of width 64. It has no
gradient, so it serves where none is wanted; the two agree to the rounding of bf16, of which the body does one less.
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

#: Whether this PyTorch was built with oneDNN's fused layers.
_BUILT = hasattr(torch.ops.mkldnn, "_linear_pointwise")

#: oneDNN's names.
_NAMES: dict[HiddenActivation, str] = {"relu": "relu", "silu": "swish"}


def activation(x: Tensor, act: HiddenActivation) -> Tensor:
    """Apply an activation by its name."""
    return F.relu(x) if act == "relu" else F.silu(x)


def linear_plain(
    x: Float[Tensor, "Q I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"], act: HiddenActivation
) -> Float[Tensor, "Q O"]:
    """Compute it as written: the twin, and the body wherever a gradient is wanted."""
    return activation(F.linear(x, weight, bias), act)


def linear_activated(
    x: Float[Tensor, "Q I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"], act: HiddenActivation
) -> Float[Tensor, "Q O"]:
    """Compute a layer; see the contract at the top of this file."""
    fused = (
        type(x) is Tensor  # a subclass, such as a fake tensor, goes the way of every device
        and x.dtype == torch.bfloat16
        and on_cpu(x)
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.enabled
        and _here()
    )
    if not fused:
        return linear_plain(x, weight, bias, act)
    return torch.ops.mkldnn._linear_pointwise(x, weight.to(x.dtype), bias.to(x.dtype), _NAMES[act], [], "")


@functools.cache
def _here() -> bool:
    """Say whether oneDNN and this processor have the body: below AVX-512 it has no bf16."""
    return _BUILT and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _flops(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * x.numel() * weight[0]


if _BUILT:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)
