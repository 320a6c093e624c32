"""Compile all launches of Triton kernels with Triton's JIT, without running them (``python -m tests.fused.jit``).

Unlike the interpreter and ahead-of-time compilation, the JIT turns sizes of 1 into constants and specializes pointers
and sizes by their alignment. This module runs in a separate process because it replaces Triton's driver.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lrm_pl.kernels import decode_along_rays as fused
from lrm_pl.kernels import decode_along_rays_triton, modulated_norm_triton
from lrm_pl.kernels.device import GpuProperties, as_accelerator
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.transformer import ScaledLayerNorm
from lrm_pl.models.triplane import Triplane


class Driver:
    """A simulated GPU."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class Compiled:
    """Kernel that is compiled instead of launched."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        def compile_only(*given, **named):
            self.launches += 1
            self.kernel.warmup(*given, grid=grid, **named)

        return compile_only


def main():
    """Launch kernels with bfloat16 and float32, and with sizes that the JIT specializes."""
    driver.set_active(Driver())
    kernels = []
    for module in (decode_along_rays_triton, modulated_norm_triton):
        for name in ("forward", "backward"):
            kernels.append(Compiled(getattr(module, name)))
            setattr(module, name, kernels[-1])
    with as_accelerator(GpuProperties((9, 0), 132, 50 * 2**20)):
        decoder = NeRFDecoder(channels=4, width=16, layers=3, activation="silu")
        field = decoder.field(Triplane(torch.randn(1, 3, 4, 8, 8)))
        for dtype in (torch.bfloat16, torch.float32):
            mlp, planes = fused.pack(field.weights, dtype), field.planes[0].detach().to(dtype)
            for rows, columns, samples in ((16, 16, 16), (1, 1, 1), (6, 9, 5)):
                rays, t = torch.rand(rows, columns, 3), torch.rand(rows, columns, samples)
                along_rays = fused.RaySamples(rays, rays, t, torch.ones(rows, columns, dtype=torch.bool))
                given = planes, along_rays, mlp, field.axes, "silu"
                assert fused.decode_along_rays(*given).shape == (rows, columns, samples, 4)
                sums = fused.accumulate_gradient(torch.zeros(3, 8, 8, 16), torch.rand(*t.shape, 4), *given)
                assert sums.weights.shape == mlp.weights.shape
        for batch, length, dim in ((2, 6, 16), (1, 1, 1)):
            x = torch.randn(batch, length, dim, requires_grad=True)
            norm = ScaledLayerNorm(dim)
            norm(x, torch.zeros(batch, dim), torch.zeros(batch, dim)).sum().backward()
    counts = [kernel.launches for kernel in kernels]
    assert counts == [6, 6, 2, 2], counts
    print("compiled", sum(counts), "launches")


if __name__ == "__main__":
    main()
