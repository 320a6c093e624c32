"""What machines can do: GPUs from their makers' tables, the CPU by measuring it."""

import dataclasses
import functools
import time

import torch
from torch.nn import functional as F

from lrm_pl.kernels.device import on_cpu, on_cuda


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, by its maker's data sheet.

    Attributes:
        title: What it is called.
        words: What the name that PyTorch gives it contains.
        flops: bf16 products with float32 sums, dense, operations a second.
        single: The same in float32.
        memory: Bytes.
        bandwidth: Bytes of its memory read or written a second.
        link: Bytes a second that it sends to others in its node (NVLink, else PCIe).
    """

    title: str
    words: tuple[str, ...]
    flops: float
    single: float
    memory: float
    bandwidth: float
    link: float

    def products(self, dtype: torch.dtype) -> float:
        """Return operations a second of products in a type."""
        return self.single if dtype == torch.float32 else self.flops


#: By the name of `lrm estimate --gpu`; the more special first. (Lightning's own table mixes dense and sparse figures.)
GPUS = {
    "a100-40g": Gpu("A100 40 GB", ("A100", "40GB"), 312e12, 19.5e12, 40e9, 1.555e12, 300e9),
    "a100-80g": Gpu("A100 80 GB", ("A100",), 312e12, 19.5e12, 80e9, 2.039e12, 300e9),
    "h100-pcie": Gpu("H100 PCIe", ("H100", "PCIe"), 756e12, 51e12, 80e9, 2.0e12, 64e9),
    "h100": Gpu("H100 SXM", ("H100",), 989.4e12, 67e12, 80e9, 3.35e12, 450e9),
    "h200": Gpu("H200", ("H200",), 989.4e12, 67e12, 141e9, 4.8e12, 450e9),
    "b200": Gpu("B200", ("B200",), 2250e12, 75e12, 180e9, 7.7e12, 900e9),
    "l40s": Gpu("L40S", ("L40S",), 362e12, 91.6e12, 48e9, 0.864e12, 32e9),
    "l4": Gpu("L4", ("L4",), 121e12, 30.3e12, 24e9, 0.3e12, 32e9),
    "a10g": Gpu("A10G", ("A10G",), 70e12, 31.2e12, 24e9, 0.6e12, 32e9),
    "rtx-4090": Gpu("RTX 4090", ("RTX 4090",), 165e12, 82.6e12, 24e9, 1.008e12, 32e9),
    "rtx-3090": Gpu("RTX 3090", ("RTX 3090",), 71e12, 35.6e12, 24e9, 0.936e12, 32e9),
}  # fmt: skip


#: Words that make another GPU, or a part of one, of a name.
_OTHERS = {"NVL", "Laptop", "Ti", "D", "SUPER", "MIG"}


def gpu_of_name(name: str) -> Gpu | None:
    """Find a GPU by the name that PyTorch gives it; None where the table lacks it."""
    if _OTHERS & set(name.replace("-", " ").split()):
        return None
    words = [*name.replace("-", " ").split(), name]
    for gpu in GPUS.values():
        if all(any(word == part or (" " in word and word in name) for part in words) for word in gpu.words):
            return gpu
    return None


@functools.cache
def cpu_flops(dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure this process's products a second, once: of the shape of the paper's MLP, the best of nine."""
    x, w = torch.randn(3072, 1024, dtype=dtype), torch.randn(4096, 1024, dtype=dtype)
    seconds = []
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        F.linear(x, w)
        for _ in range(9):
            start = time.perf_counter()
            F.linear(x, w)
            seconds.append(time.perf_counter() - start)
    return 2 * 3072 * 1024 * 4096 / min(seconds)


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 operations a second that a device can do at most; None for a GPU that the table lacks."""
    if not on_cuda(device):
        return cpu_flops() if on_cpu(device) else None
    gpu = gpu_of_name(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.flops
