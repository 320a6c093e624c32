"""Peak rates and memory of GPUs from data sheets, and a measurement of the peak rate of the CPU."""

import dataclasses
import difflib
import functools
import re
import timeit

import torch
from torch.nn import functional as F

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import GpuProperties, on_cpu, on_cuda


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Specifications of a GPU.

    Attributes:
        name: Name of the GPU. It includes the memory size if there are variants with different memory sizes.
        half: Dense float16 rate with float32 accumulation, in FLOP/s. The bfloat16 rate is the same if supported.
        single: Dense float32 rate without TF32, in FLOP/s.
        memory: Memory size in bytes.
        bandwidth: Memory bandwidth in bytes per second.
        link: Bandwidth to other GPUs of the node (NVLink, Infinity Fabric or PCIe), in bytes per second per direction.
        properties: Device properties that determine which kernels are selected.
    """

    name: str
    half: float
    single: float
    memory: float
    bandwidth: float
    link: float
    properties: GpuProperties

    @property
    def has_bfloat16(self) -> bool:
        """Whether the tensor cores support bfloat16 (compute capability 8.0 or higher)."""
        return self.properties.capability >= (8, 0)

    def peak(self, dtype: torch.dtype) -> float:
        """Return the peak rate of matrix products in FLOP/s.

        Args:
            dtype: Data type of the matrix products.

        Raises:
            InputError: ``dtype`` is bfloat16, which the GPU does not support in hardware.
        """
        if dtype == torch.bfloat16 and not self.has_bfloat16:
            raise InputError(
                expected=f"a precision that the {self.name} supports in hardware",
                found="bf16",
                remedy="use --trainer.precision 16-mixed",
            )
        return self.single if dtype == torch.float32 else self.half


#: The columns are name, half and single rate in TFLOP/s, memory in GB, bandwidth of memory and link in GB/s, compute
#: capability, number of multiprocessors, and L2 cache in MB. The values are from data sheets and architecture white
#: papers. On GeForce GPUs, the rate with float32 accumulation is half the rate with float16 accumulation. The 480 GB in
#: the name of the GH200 refer to CPU memory. An MI250X consists of two devices, and the row describes one device.
_TABLE = """
A100 80GB                  312    19.5   80 2039 300  8.0 108  40
A100 40GB                  312    19.5   40 1555 300  8.0 108  40
A100 PCIe 80GB             312    19.5   80 1935  32  8.0 108  40
A100 PCIe 40GB             312    19.5   40 1555  32  8.0 108  40
A800 80GB                  312    19.5   80 2039 200  8.0 108  40
A800 PCIe 80GB             312    19.5   80 1935 200  8.0 108  40
H800                       989.4  67     80 3350 200  9.0 132  50
H800 PCIe                  756    51     80 2000  64  9.0 114  50
H20                        148    44     96 4000 450  9.0  78  60
H100                       989.4  67     80 3350 450  9.0 132  50
H100 PCIe                  756    51     80 2000  64  9.0 114  50
H100 NVL                   835    60     94 3938  64  9.0 132  50
H200                       989.4  67    141 4800 450  9.0 132  50
H200 NVL                   835    60    141 4800 450  9.0 132  50
GH200 96GB                 989.4  67     96 4000 450  9.0 132  50
GH200 480GB                989.4  67     96 4000 450  9.0 132  50
GH200 144GB                989.4  67    144 4900 450  9.0 132  50
B200                       2250   75    180 7700 900 10.0 148 126
GB200                      2500   80    186 8000 900 10.0 148 126
MI300X                     1307.4 163.4 192 5300 448  9.4 304  32
MI325X                     1307.4 163.4 256 6000 448  9.4 304  32
MI250X                     191.5  23.9   64 1638 200  9.0 110   8
MI210                      181    22.6   64 1638  32  9.0 104   8
L40S                       362    91.6   48  864  32  8.9 142  96
L40                        181    90.5   48  864  32  8.9 142  96
L4                         121    30.3   24  300  32  8.9  58  48
A40                        149.7  37.4   48  696  32  8.6  84   6
A30                        165    10.3   24  933  32  8.0  56  24
A10                        125    31.2   24  600  32  8.6  72   6
A10G                       70     31.2   24  600  32  8.6  80   6
V100 16GB                  125    15.7   16  900 150  7.0  80   6
V100 32GB                  125    15.7   32  900 150  7.0  80   6
V100 PCIe 16GB             112    14     16  900  16  7.0  80   6
V100 PCIe 32GB             112    14     32  900  16  7.0  80   6
V100S                      130    16.4   32 1134  16  7.0  80   6
T4                         65     8.1    16  320  16  7.5  40   4
P100                       21.2   10.6   16  732  80  6.0  56   4
P100 PCIe 16GB             18.7   9.3    16  732  16  6.0  56   4
P100 PCIe 12GB             18.7   9.3    12  549  16  6.0  56   4
TITAN RTX                  130.5  16.3   24  672  16  7.5  72   6
Quadro RTX 8000            130.5  16.3   48  672  16  7.5  72   6
Quadro RTX 6000            130.5  16.3   24  672  16  7.5  72   6
RTX PRO 6000               503.8  125.9  96 1792  64 12.0 188 128
RTX 6000 Ada               364.2  91.1   48  960  32  8.9 142  96
RTX 5000 Ada               261    65.3   32  576  32  8.9 100  64
RTX A6000                  154.8  38.7   48  768  32  8.6  84   6
RTX A5000                  111.1  27.8   24  768  32  8.6  64   6
RTX A4000                  76.7   19.2   16  448  32  8.6  48   4
GeForce RTX 5090           209.5  104.8  32 1792  64 12.0 170  96
GeForce RTX 5080           112.6  56.3   16  960  64 12.0  84  64
GeForce RTX 5070 Ti        87.9   43.9   16  896  64 12.0  70  48
GeForce RTX 5070           61.7   30.9   12  672  64 12.0  48  48
GeForce RTX 5060 Ti 16GB   47.4   23.7   16  448  32 12.0  36  32
GeForce RTX 5060 Ti 8GB    47.4   23.7    8  448  32 12.0  36  32
GeForce RTX 5060           38.4   19.2    8  448  32 12.0  30  32
GeForce RTX 4090           165.2  82.6   24 1008  32  8.9 128  72
GeForce RTX 4090 D         147.1  73.5   24 1008  32  8.9 114  72
GeForce RTX 4080 SUPER     104.4  52.2   16  736  32  8.9  80  64
GeForce RTX 4080           97.5   48.7   16  717  32  8.9  76  64
GeForce RTX 4070 Ti SUPER  88.2   44.1   16  672  32  8.9  66  48
GeForce RTX 4070 Ti        80.2   40.1   12  504  32  8.9  60  48
GeForce RTX 4070 SUPER     71     35.5   12  504  32  8.9  56  48
GeForce RTX 4070           58.3   29.1   12  504  32  8.9  46  36
GeForce RTX 4060 Ti 16GB   44.1   22.1   16  288  16  8.9  34  32
GeForce RTX 4060 Ti 8GB    44.1   22.1    8  288  16  8.9  34  32
GeForce RTX 4060           30.2   15.1    8  272  16  8.9  24  24
GeForce RTX 3090 Ti        80     40     24 1008  32  8.6  84   6
GeForce RTX 3090           71     35.6   24  936  32  8.6  82   6
GeForce RTX 3080 Ti        68.2   34.1   12  912  32  8.6  80   6
GeForce RTX 3080 10GB      59.5   29.8   10  760  32  8.6  68   5
GeForce RTX 3080 12GB      61.3   30.6   12  912  32  8.6  70   6
GeForce RTX 3070 Ti        43.5   21.7    8  608  32  8.6  48   4
GeForce RTX 3070           40.6   20.3    8  448  32  8.6  46   4
GeForce RTX 3060 Ti        32.4   16.2    8  448  32  8.6  38   4
GeForce RTX 3060           25.5   12.7   12  360  32  8.6  28   3
GeForce RTX 2080 Ti        53.8   13.4   11  616  16  7.5  68   5
GeForce RTX 3050           18.2   9.1     8  224  16  8.6  20   2
"""


def _row(line: str) -> Gpu:
    *name, half, single, memory, bandwidth, link, capability, multiprocessors, l2 = line.split()
    major, minor = (int(x) for x in capability.split("."))
    return Gpu(
        " ".join(name), float(half) * 1e12, float(single) * 1e12, float(memory) * 1e9, float(bandwidth) * 1e9,
        float(link) * 1e9, GpuProperties((major, minor), int(multiprocessors), int(l2) * 2**20),
    )  # fmt: skip


#: Known GPUs. If a name without a memory size matches several GPUs, the first match is used.
GPUS = tuple(_row(line) for line in _TABLE.strip().splitlines())

#: Words that are ignored in names of GPUs.
_MAKERS = frozenset({"nvidia", "amd", "geforce", "tesla", "instinct", "rtx", "gpu"})
_FORMS = frozenset(
    "sxm sxm2 sxm3 sxm4 sxm5 sxm6 oam pcie nvlink nvl72 hbm2 hbm2e hbm3 hbm3e generation workstation server edition "
    "blackwell".split()
)


def gpu_of_name(name: str) -> Gpu | None:
    """Return the GPU with a given name, or None if it is not in the table.

    All words except the manufacturer and the form factor must match, because laptop, Ti, SUPER and MIG variants are
    different GPUs.

    Args:
        name: Name as reported by PyTorch, or a common name such as "4090".
    """
    words, memory = _parse_name(name)
    for ignored in (frozenset[str](), _FORMS):
        for gpu in GPUS:
            gpu_words, gpu_memory = _parse_name(gpu.name)
            # A memory size in the name of the GPU must match exactly, and other sizes with a tolerance of 10 %.
            low, high = (gpu_memory,) * 2 if gpu_memory else (0.9e-9 * gpu.memory, 1.1e-9 * gpu.memory)
            if gpu_words == words - (ignored - gpu_words) and (memory is None or low <= memory <= high):
                return gpu
    return None


def require_gpu(name: str) -> Gpu:
    """Return the GPU with a given name.

    Raises:
        InputError: The GPU is not in the table. The message lists similar names.
    """
    gpu = gpu_of_name(name)
    if gpu is None:
        by_words = {" ".join(sorted(_parse_name(gpu.name)[0])): gpu.name for gpu in reversed(GPUS)}
        close = difflib.get_close_matches(" ".join(sorted(_parse_name(name)[0])), by_words, n=4, cutoff=0.4)
        examples = [by_words[words] for words in close] or ["H100", "4090", "MI300X"]
        raise InputError(
            expected="a known GPU",
            found=f"{name!r}",
            remedy=f"use a name such as {', '.join(examples)}, or a known GPU with similar memory and TFLOP/s",
        )
    return gpu


def _parse_name(name: str) -> tuple[frozenset[str], int | None]:
    """Split the name of a GPU into lower-case words, without the manufacturer, and the memory size.

    Returns:
        The words, and the memory size in GB or None if the name contains no unique memory size.
    """
    text = re.sub(r"(\d)\s+gb?\b", r"\1gb", name.lower())
    text = re.sub(
        r"\brtx(?=a|\d|pro)|(?<=\d{4})(?=ti|super|ada|d\b)|(?<=\d)(?=pcie|sxm|nvl)", r"\g<0> ", text
    )
    text = re.sub(r"\bti(?=super)|\bpro(?=\d)", r"\g<0> ", text)
    words = set(re.split(r"[\s_\-]+", text.strip())) - _MAKERS
    # Model numbers have four digits or contain letters, so numbers with two or three digits are memory sizes.
    sizes = {word for word in words if re.fullmatch(r"\d+gb?|\d{2,3}", word)}
    if len(sizes) > 1:
        return frozenset(words), None  # the memory size is ambiguous
    memory = int(re.sub(r"\D", "", min(sizes))) if sizes else None
    return frozenset(words - sizes), memory


@functools.cache
def cpu_flops(dtype: torch.dtype = torch.bfloat16) -> float:
    """Measure the peak rate of matrix products on the CPU in FLOP/s, and cache the result.

    The result is the best of four products that have the shape of the MLP in the LRM paper.
    """
    x, w = torch.randn(3072, 1024, dtype=dtype), torch.randn(4096, 1024, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        seconds = timeit.repeat(lambda: F.linear(x, w), repeat=4, number=1)
    return 2 * 3072 * 1024 * 4096 / min(seconds)


def peak_flops(device: torch.device) -> float | None:
    """Return the peak half-precision rate of a device in FLOP/s, or None if it is unknown."""
    if not on_cuda(device):
        return cpu_flops() if on_cpu(device) else None
    gpu = gpu_of_name(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.half
