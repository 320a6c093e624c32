"""Formulas for the memory traffic of the fused decoder kernels, which ``OperationCounter`` uses."""

import torch
from torch import Tensor

from lrm_pl.kernels.decode_along_rays import plan_launch
from lrm_pl.kernels.device import gpu_properties
from lrm_pl.planning.operation_counter import MemoryAccess, register_bytes_formula


@register_bytes_formula(torch.ops.lrm_pl.decode_along_rays)
def _forward_access(
    planes: Tensor, origins: Tensor, directions: Tensor, t: Tensor, alive: Tensor, weights: Tensor, biases: Tensor,
    *_: object, out_val: Tensor, **__: object,
) -> MemoryAccess:  # fmt: skip
    """Count every tensor once. The planes and the weights fit into the L2 cache, so they are read from memory once."""
    tensors = planes, origins, directions, t, alive, weights, biases, out_val
    return MemoryAccess(float(sum(x.nbytes for x in tensors)))


@register_bytes_formula(torch.ops.lrm_pl.decode_along_rays_backward)
def _backward_access(
    total: Tensor, grad: Tensor, planes: Tensor, origins: Tensor, directions: Tensor, t: Tensor, alive: Tensor,
    weights: Tensor, biases: Tensor, *_: object, **__: object,
) -> MemoryAccess:  # fmt: skip
    """Count the inputs once, and the gradients of the planes and the partial sums of each program twice."""
    gpu = gpu_properties(t.device)
    assert gpu is not None, "the operator runs on a GPU, real or emulated"
    launch = plan_launch(planes, t, biases, gpu)
    inputs = sum(x.nbytes for x in (planes, grad, origins, directions, t, alive, weights, biases))
    sums = 4 * launch.programs * (weights.numel() + biases.numel())
    return MemoryAccess(inputs + 2 * total.nbytes + 2 * sums, float(launch.scratch))
