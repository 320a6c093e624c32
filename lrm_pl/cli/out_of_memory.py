"""Detection of out-of-memory errors, and the message that is printed for them."""

import shlex
from collections.abc import Sequence

import torch

from lrm_pl.kernels.device import num_visible_gpus
from lrm_pl.planning.gpus import gpu_of_name

#: Substrings of the messages of out-of-memory errors that are plain ``RuntimeError`` exceptions.
_MESSAGES = ("can't allocate memory", "std::bad_alloc", "CUDA error: out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that a GPU, PyTorch's CPU allocator or Python is out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
    )


def out_of_memory_message(error: BaseException, arguments: Sequence[str]) -> str:
    """Return the message for an out-of-memory error, including the command that lists settings with less memory use.

    Args:
        error: The error.
        arguments: Arguments of ``lrm fit``.
    """
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    command = ["lrm", "estimate", "--less-memory", *_gpu_options(), *arguments]
    return (
        f"out of memory: {first_line}\nTo list settings that need less memory, run:\n  {shlex.join(command)}"
    )


def _gpu_options() -> list[str]:
    if not num_visible_gpus():
        return []
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    gpu = gpu_of_name(torch.cuda.get_device_name())
    return ["--gpus", str(processes), *(["--gpu", gpu.name] if gpu else [])]
