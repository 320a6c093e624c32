"""Every decision that depends on the device: which implementation runs, how work is divided, what CUDA provides.

No other file compares devices; ``tests/unit/test_device.py`` checks that. All decisions between a CPU and an
accelerator go through ``on_cpu``, so that tests can run the accelerator's branches on CPU tensors by emptying
``HOST_TYPES``.
"""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from lrm_pl.errors import InputError

#: Device types served by the CPU implementations.
HOST_TYPES = {"cpu"}


def on_cpu(where: Tensor | torch.device) -> bool:
    """Return whether the CPU implementation of an operation applies to a tensor or device."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type in HOST_TYPES


def on_cuda(device: torch.device) -> bool:
    """Return whether the API of ``torch.cuda`` (CUDA or ROCm) applies to a device."""
    return device.type == "cuda"


def num_threads(device: torch.device) -> int:
    """Return how many threads process chunks in parallel: PyTorch's number on a CPU, 1 on an accelerator."""
    return torch.get_num_threads() if on_cpu(device) else 1


def points_per_chunk(device: torch.device) -> int:
    """Return how many points are decoded at a time: a cache's worth on a CPU, enough to fill a GPU elsewhere."""
    return 32768 if on_cpu(device) else 262144


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on a device."""
    torch.get_device_module(device).synchronize()


def launch_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device current: PyTorch's operators do so themselves, Triton launches do not."""
    return torch.cuda.device(device) if on_cuda(device) else contextlib.nullcontext()


def profiler_activities(device: torch.device) -> list[ProfilerActivity]:
    """Return what the profiler records for work on a device."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda(device) else [])]


def peak_device_memory(device: torch.device) -> int | None:
    """Return the most bytes of GPU memory that tensors of this process have occupied; None without a GPU."""
    return torch.cuda.max_memory_allocated(device) if on_cuda(device) else None


def indexed(device: torch.device) -> torch.device:
    """Return a CPU device with an index, as DeepSpeed requires; any other device unchanged."""
    return torch.device("cpu", 0) if device.type == "cpu" else device


def collective_device() -> torch.device:
    """Return the kind of device that the default process group reduces tensors on."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


def num_visible_gpus(accelerator: str = "auto") -> int:
    """Return how many GPUs a Lightning accelerator setting can use on this machine.

    Args:
        accelerator: ``trainer.accelerator``.
    """
    usable = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.device_count() if usable else 0


def requires_gpu(accelerator: str) -> bool:
    """Return whether a Lightning accelerator setting names GPUs, whether or not there are any."""
    return accelerator in ("gpu", "cuda")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return a device by name.

    Args:
        name: PyTorch's name of a device. "auto" is a GPU if there is one; "auto" and "cuda" give each process of a
            node a GPU of its own.
        local_rank: Rank of this process on its node.

    Raises:
        InputError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"  # a Slurm task may see one GPU only
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"expected a device such as cpu or cuda, found {name!r}: {reason}") from error
    if device.type == "meta":
        raise InputError("expected a device such as cpu or cuda, found 'meta', which computes nothing")
    return device
