"""Registers, spills and instructions of kernels that are compiled for several GPUs."""

import pytest
import torch
import triton

from lrm_pl.kernels.decode_along_rays import TILES
from tests.fused.build import MEASURED, TARGETS, build, builds

pytestmark = pytest.mark.skipif(
    triton.__version__ != MEASURED,
    reason=f"the bounds apply to Triton {MEASURED}, but Triton {triton.__version__} is installed",
)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("tile", TILES[torch.bfloat16])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_kernels_of_width_64_do_not_spill_and_use_vector_loads_and_tensor_cores(kernel, tile, arch):
    found = build(kernel, arch, 64, tile)
    print(found)
    assert found.spilled <= (300 if (kernel, arch) == ("backward", "sm_80") else 0)
    assert found.two_byte_loads == 0
    assert found.tensor_cores > 0
    assert found.shared <= 48 * 1024
    if kernel == "forward":
        assert found.atomics == 0
    elif arch == "sm_90":
        assert found.vector_atomics == found.atomics > 0


@pytest.mark.soak
@pytest.mark.parametrize("arch", TARGETS)
def test_kernels_spill_at_most_one_kilobyte(arch):
    for found in builds(arch):
        print(found)
        assert found.spilled <= 1024
