"""Bytes that the fused decoder reads and writes, for the ledger."""

import torch
from torch import Tensor

from lrm_pl.kernels.decode_along_rays import plan_launch
from lrm_pl.kernels.device import gpu_properties
from lrm_pl.planning.ledger import Traffic, register_bytes_formula


@register_bytes_formula(torch.ops.lrm_pl.decode_along_rays)
def _traffic(
    planes: Tensor, origins: Tensor, directions: Tensor, t: Tensor, alive: Tensor, weights: Tensor, biases: Tensor,
    *_: object, out_val: Tensor, **__: object,
) -> Traffic:  # fmt: skip
    """Return what a kernel moves: planes and weights once (an L2 cache holds them), rays and samples once."""
    tensors = planes, origins, directions, t, alive, weights, biases, out_val
    return Traffic(float(sum(x.nbytes for x in tensors)))


@register_bytes_formula(torch.ops.lrm_pl.decode_along_rays_backward)
def _backward_traffic(
    total: Tensor, grad: Tensor, planes: Tensor, origins: Tensor, directions: Tensor, t: Tensor, alive: Tensor,
    weights: Tensor, biases: Tensor, *_: object, **__: object,
) -> Traffic:  # fmt: skip
    """Return the same for backward: gradients of planes read and written, programs' sums written and read."""
    gpu = gpu_properties(t.device)
    assert gpu is not None, "the operator runs on a GPU, assumed or real"
    launch = plan_launch(planes, t, biases, gpu)
    inputs = sum(x.nbytes for x in (planes, grad, origins, directions, t, alive, weights, biases))
    sums = 4 * launch.programs * (weights.numel() + biases.numel())
    return Traffic(inputs + 2 * total.nbytes + 2 * sums, float(launch.scratch))
