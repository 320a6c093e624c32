"""Measurement of the peak memory of this process."""

import functools
import resource
import sys
from pathlib import Path

import torch

from lrm_pl.kernels.device import peak_device_memory


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process so far in GiB, as a mapping from metric names to values."""
    peaks = {"memory/peak_host_gib": _host_peak() / 1024**3}
    if (on_gpu := peak_device_memory(device)) is not None:
        peaks["memory/peak_gpu_gib"] = on_gpu / 1024**3
    return peaks


def _host_peak() -> float:
    """Return the peak resident set size in bytes.

    On Linux, VmHWM is used because ru_maxrss is inherited from the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024.0 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss
    return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


#: Bytes that compiled kernels and temporary copies of the LPIPS networks occupy at the start of a run.
_STARTUP = 0.2e9


@functools.cache
def memory_of_libraries() -> float:
    """Return the memory that Python and the libraries occupy, in bytes.

    The result is cached. Call this function for the first time before a network is created.
    """
    return peak_memory(torch.device("cpu"))["memory/peak_host_gib"] * 2**30 + _STARTUP
