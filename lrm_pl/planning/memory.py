"""What a run holds in memory at most."""

import functools
import resource
import sys
from pathlib import Path

import torch

from lrm_pl.kernels.device import peak_device_memory


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the most memory that this process has held so far, in GiB, by the name it is logged under."""
    peaks = {"memory/peak_host_gib": _host_peak() / 1024**3}
    if (on_gpu := peak_device_memory(device)) is not None:
        peaks["memory/peak_gpu_gib"] = on_gpu / 1024**3
    return peaks


def _host_peak() -> float:
    """Return bytes. Linux' ru_maxrss is no less than that of whoever started the process: VmHWM is its own."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024.0 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


#: Bytes that a run loads besides when it begins: compiled kernels, the networks of LPIPS while they are read.
_LATER = 0.2e9


@functools.cache
def memory_of_libraries() -> float:
    """Return the bytes of Python and its libraries in a run; to be called before there is a network."""
    return peak_memory(torch.device("cpu"))["memory/peak_host_gib"] * 2**30 + _LATER
