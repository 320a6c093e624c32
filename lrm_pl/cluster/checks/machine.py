"""Checks of the CPUs, GPUs, collectives, shared memory and open files of a node."""

import os
import resource
import shutil
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
    remedy = f"use {needed} CPUs, one for each process and data worker, or lower --data.workers"
    return Finding("processors", found, warning=remedy if cpus < needed else "")


def gpus(run: RunRequirements) -> Finding:
    """Check that PyTorch can use as many GPUs as the run needs."""
    count = num_visible_gpus()
    found = "none"
    if count:
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
        found = ", ".join(f"{device.name} {device.total_memory / GB:.0f} GB" for device in devices)
        found = f"{count}: {found}; driver {_driver()}"
    remedy = (
        f"request {run.gpus} GPUs per node from Slurm with GPUS=, check `nvidia-smi` and the CUDA version of PyTorch "
        f"({torch.version.cuda or 'a CPU build'}), or train on CPUs with GPUS=0"
    )
    return Finding("GPUs", found, missing=remedy if run.gpus > count else "")


def bf16(run: RunRequirements) -> Finding:
    """Check that the hardware supports bf16 matrix products."""
    if run.gpus and not num_visible_gpus():
        return Finding("bf16", "no GPU", warning="see the remedy of the row GPUs")
    if run.gpus:
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        path = Path("/proc/cpuinfo")
        flags = path.read_text().split() if path.is_file() else []
        able = "amx_bf16" in flags or "avx512_bf16" in flags
    remedy = "use --trainer.precision 32-true, which is faster than emulated bf16"
    return Finding(
        "bf16",
        "supported by the hardware" if able else "not supported by the hardware",
        warning=remedy if "bf16" in run.precision and not able else "",
    )


def collectives(run: RunRequirements) -> Finding:
    """Check that the backend for collectives is available (NCCL for GPUs, Gloo for CPUs)."""
    backend = "nccl" if run.gpus else "gloo"
    if not torch.distributed.is_available() or not torch.distributed.is_backend_available(backend):
        remedy = f"install a build of PyTorch with {backend}, such as the wheels on PyPI"
        return Finding("collectives", f"no {backend}", remedy)
    number = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if backend == "nccl" else ""  # type: ignore[no-untyped-call]
    return Finding("collectives", backend + number, uniform=True)


def shared_memory(run: RunRequirements) -> Finding:
    """Check that /dev/shm, which data workers and NCCL use to exchange tensors, exists and is large enough."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(
            "/dev/shm", "none", warning="use --data.workers 0, because data workers require /dev/shm"
        )
    return shared_memory_of(shutil.disk_usage(path).total, run.processes * run.workers)


def shared_memory_of(total: int, workers: int) -> Finding:
    """Check the size of /dev/shm.

    Args:
        total: Size of /dev/shm in bytes.
        workers: Number of data workers of the node.
    """
    remedy = "start the container with --shm-size=8g, or use --data.workers 0, because data workers may crash"
    return Finding("/dev/shm", f"{total / GB:.1f} GB", warning=remedy if total < GB and workers else "")


def open_files() -> Finding:
    """Check the limit on open files, because data workers share tensors through file descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = f"raise the limit with `ulimit -n 1024` (the hard limit is {hard})"
    return Finding("open files", f"at most {soft}", warning=remedy if 0 <= soft < 1024 else "")


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or f"unknown (nvidia-smi failed with status {done.returncode})"
