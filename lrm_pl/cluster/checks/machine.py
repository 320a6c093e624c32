"""What one node is: processors, GPUs, collectives, shared memory, open files, a port."""

import os
import resource
import shutil
import socket
import subprocess
from pathlib import Path

import torch

from lrm_pl.cluster.checks.finding import Finding
from lrm_pl.cluster.checks.wanted import Wanted
from lrm_pl.errors import counted
from lrm_pl.kernels.device import num_visible_gpus

GB = 1 << 30


def processors(wanted: Wanted) -> Finding:
    """Compare the CPUs that this process may use with the processes that the run starts on a node."""
    cpus = len(os.sched_getaffinity(0))
    needed = wanted.processes * (1 + wanted.workers)
    found = (
        f"{cpus} CPUs for {counted(wanted.processes, 'process')} with {wanted.workers} loader workers each"
    )
    if cpus < needed:
        remedy = f"they share CPUs; {needed} would keep them apart, or lower --data.workers"
        return Finding("processors", found, "warning", remedy)
    return Finding("processors", found)


def gpus(wanted: Wanted) -> Finding:
    """Count the GPUs that torch sees."""
    count = num_visible_gpus()
    found = "none"
    if count:
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
        found = ", ".join(f"{device.name} {device.total_memory / GB:.0f} GB" for device in devices)
        found = f"{count}: {found}; driver {_driver()}"
    if wanted.gpus > count:
        remedy = (
            f"{wanted.gpus} a node are asked for: ask Slurm for them (GPUS=), see `nvidia-smi` and the CUDA build of "
            f"torch ({torch.version.cuda or 'this is a CPU build'}), or train on CPUs with GPUS=0"
        )
        return Finding("GPUs", found, "missing", remedy)
    return Finding("GPUs", found)


def bf16(wanted: Wanted) -> Finding:
    """Find whether bf16 products are made in hardware."""
    if wanted.gpus and not num_visible_gpus():
        return Finding("bf16", "no GPU to look at", "warning", "see the row of GPUs")
    if wanted.gpus:
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        path = Path("/proc/cpuinfo")
        flags = path.read_text().split() if path.is_file() else []
        able = "amx_bf16" in flags or "avx512_bf16" in flags
    found = "in hardware" if able else "not in hardware"
    if "bf16" in wanted.precision and not able:
        remedy = "it runs, slowly: --trainer.precision 32-true is faster here"
        return Finding("bf16", found, "warning", remedy)
    return Finding("bf16", found)


def collectives(wanted: Wanted) -> Finding:
    """Find whether processes can talk: NCCL among GPUs, gloo among CPUs."""
    backend = "nccl" if wanted.gpus else "gloo"
    if not torch.distributed.is_available() or not torch.distributed.is_backend_available(backend):
        remedy = f"install a torch build with {backend}, as the wheels of PyPI are"
        return Finding("collectives", f"no {backend}", "missing", remedy)
    number = f" {'.'.join(map(str, torch.cuda.nccl.version()))}" if backend == "nccl" else ""  # type: ignore[no-untyped-call]
    return Finding("collectives", backend + number, alike=True)


def shared_memory(wanted: Wanted) -> Finding:
    """Measure /dev/shm, through which loader workers and NCCL hand over tensors."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "none", "warning", "loader workers need it; run with --data.workers 0")
    return shared_memory_of(shutil.disk_usage(path).total, wanted.processes * wanted.workers)


def shared_memory_of(total: int, workers: int) -> Finding:
    """Judge the size of /dev/shm in bytes for so many loader workers on the node."""
    found = f"{total / GB:.1f} GB"
    if total < GB and workers:
        remedy = (
            "loader workers may die of it: start the container with --shm-size=8g, or use --data.workers 0"
        )
        return Finding("/dev/shm", found, "warning", remedy)
    return Finding("/dev/shm", found)


def open_files() -> Finding:
    """Read the limit of open files; workers hand over tensors as open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"at most {soft}"
    if 0 <= soft < 1024:
        return Finding(
            "open files", found, "warning", f"raise it to 1024 or more (hard limit {hard}): ulimit -n 1024"
        )
    return Finding("open files", found)


def port(number: int) -> Finding:
    """Find whether a port is free for the processes of one node to meet at; 0 means any."""
    with socket.socket() as probe:
        try:
            probe.bind(("", number))
        except OSError as error:
            remedy = "choose another (MASTER_PORT), or end what listens there: ss -ltnp"
            return Finding("port", f"{number}: {error.strerror}", "missing", remedy)
    return Finding("port", f"{number} is free" if number else "a free one is to be had")


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or f"unknown (nvidia-smi ended with {done.returncode})"
