"""Checks of the CPUs, GPUs, collectives, shared memory, open files and ports of a node."""

import os
import resource
import shutil
import socket
import subprocess
from pathlib import Path

import torch

from lrm_pl.cluster.checks.findings import Finding
from lrm_pl.cluster.checks.requirements import RunRequirements
from lrm_pl.errors import counted
from lrm_pl.kernels.device import num_visible_gpus

GB = 1 << 30


def processors(run: RunRequirements) -> Finding:
    """Check that there is one CPU for each process and each data worker of the node."""
    cpus = len(os.sched_getaffinity(0))
    needed = run.processes * (1 + run.workers)
    found = f"{cpus} CPUs for {counted(run.processes, 'process')} with {run.workers} data workers each"
    if cpus < needed:
        remedy = f"use {needed} CPUs, one for each, or lower --data.workers"
        return Finding("processors", found, "warning", remedy)
    return Finding("processors", found)


def gpus(run: RunRequirements) -> Finding:
    """Check that PyTorch can use as many GPUs as the run needs."""
    count = num_visible_gpus()
    found = "none"
    if count:
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
        found = ", ".join(f"{device.name} {device.total_memory / GB:.0f} GB" for device in devices)
        found = f"{count}: {found}; driver {_driver()}"
    if run.gpus > count:
        remedy = (
            f"the run needs {run.gpus} per node: request them from Slurm with GPUS=, check `nvidia-smi` and the CUDA "
            f"version of PyTorch ({torch.version.cuda or 'a CPU build'}), or train on CPUs with GPUS=0"
        )
        return Finding("GPUs", found, "missing", remedy)
    return Finding("GPUs", found)


def bf16(run: RunRequirements) -> Finding:
    """Check that the hardware supports bf16 matrix products."""
    if run.gpus and not num_visible_gpus():
        return Finding("bf16", "no GPU", "warning", "see the row of GPUs")
    if run.gpus:
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        path = Path("/proc/cpuinfo")
        flags = path.read_text().split() if path.is_file() else []
        able = "amx_bf16" in flags or "avx512_bf16" in flags
    found = "in hardware" if able else "not in hardware"
    if "bf16" in run.precision and not able:
        remedy = "bf16 is emulated: --trainer.precision 32-true is faster"
        return Finding("bf16", found, "warning", remedy)
    return Finding("bf16", found)


def collectives(run: RunRequirements) -> Finding:
    """Check that the backend of collectives is available, which is NCCL on GPUs and Gloo on CPUs."""
    backend = "nccl" if run.gpus else "gloo"
    if not torch.distributed.is_available() or not torch.distributed.is_backend_available(backend):
        remedy = f"install a build of PyTorch with {backend}, such as the PyPI wheels"
        return Finding("collectives", f"no {backend}", "missing", remedy)
    number = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if backend == "nccl" else ""  # type: ignore[no-untyped-call]
    return Finding("collectives", backend + number, uniform=True)


def shared_memory(run: RunRequirements) -> Finding:
    """Check that /dev/shm, which data workers and NCCL use to pass tensors, exists and is large enough."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "none", "warning", "data workers need it: use --data.workers 0")
    return shared_memory_of(shutil.disk_usage(path).total, run.processes * run.workers)


def shared_memory_of(total: int, workers: int) -> Finding:
    """Check the size of /dev/shm.

    Args:
        total: Size of /dev/shm in bytes.
        workers: Number of data workers of the node.
    """
    found = f"{total / GB:.1f} GB"
    if total < GB and workers:
        remedy = "data workers may crash: start the container with --shm-size=8g, or use --data.workers 0"
        return Finding("/dev/shm", found, "warning", remedy)
    return Finding("/dev/shm", found)


def open_files() -> Finding:
    """Check the limit on open files, because data workers pass tensors as open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"at most {soft}"
    if 0 <= soft < 1024:
        return Finding(
            "open files", found, "warning", f"raise it to 1024 or more (hard limit {hard}): ulimit -n 1024"
        )
    return Finding("open files", found)


def port(number: int) -> Finding:
    """Check that a port is free for the rendezvous of one node's processes.

    Args:
        number: Number of the port. If 0, the operating system chooses a free port.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("", number))
        except OSError as error:
            remedy = "choose another with MASTER_PORT, or stop the process that uses it (ss -ltnp)"
            return Finding("port", f"{number}: {error.strerror}", "missing", remedy)
    return Finding("port", f"{number} is free" if number else "a free port is available")


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or f"unknown (nvidia-smi ended with {done.returncode})"
