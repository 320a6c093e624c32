"""Formulas used by ``OperationCounter`` for the memory traffic of the fused decoder kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrm_pl.kernels.decode_along_rays import plan_launch
from lrm_pl.kernels.device import gpu_properties


def _forward_access(
    planes: Tensor, samples: list[Tensor], mlp: list[Tensor], *_: object, out_val: Tensor, **__: object
) -> tuple[float, float]:
    """Return the number of bytes read and written by the forward kernel, and the size of its temporary buffers.

    Every tensor is counted once. The planes and the weights fit into the L2 cache, so they are read from memory once.
    """
    return float(sum(x.nbytes for x in (planes, *samples, *mlp, out_val))), 0.0


def _backward_access(
    total: Tensor, grad: Tensor, planes: Tensor, samples: list[Tensor], mlp: list[Tensor], *_: object, **__: object
) -> tuple[float, float]:  # fmt: skip
    """Return the number of bytes read and written by the backward kernel, and the size of its temporary buffers.

    Inputs are counted once. The gradients of the planes and the partial sums of each program are counted twice because
    they are written and read.
    """
    gpu = gpu_properties(planes.device)
    assert gpu is not None, "the operator runs on a GPU, real or emulated"
    launch = plan_launch(planes, samples[2], mlp[1], gpu)
    inputs = sum(x.nbytes for x in (planes, grad, *samples, *mlp))
    sums = 4 * launch.programs * sum(x.numel() for x in mlp)
    return inputs + 2 * total.nbytes + 2 * sums, float(launch.scratch)


#: Maps operators to functions that return the number of bytes read and written, and the size in bytes of the temporary
#: buffers inside the operator. The functions are called with the arguments of the operator and with ``out_val``. Other
#: operators are counted as reading each input once and writing each output once.
BYTES_FORMULAS: dict[Any, Callable[..., tuple[float, float]]] = {
    torch.ops.lrm_pl.decode_along_rays: _forward_access,
    torch.ops.lrm_pl.decode_along_rays_backward: _backward_access,
}
