"""What a run holds in memory at most."""

import functools
import resource
import sys

import torch


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that this process has held so far, in GiB, by the name it is logged under."""
    unit = 1024**3 if sys.platform == "darwin" else 1024**2  # ru_maxrss counts bytes there, KiB elsewhere
    peaks = {"memory/peak_host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        peaks["memory/peak_gpu_gib"] = torch.cuda.max_memory_allocated(device) / 1024**3
    return peaks


#: Bytes that a run loads besides when it begins: compiled kernels, the networks of LPIPS while they are read.
_LATER = 0.2e9


@functools.cache
def memory_of_libraries() -> float:
    """Return the bytes of Python and its libraries in a run; to be called before there is a network."""
    return peak_memory(torch.device("cpu"))["memory/peak_host_gib"] * 2**30 + _LATER
