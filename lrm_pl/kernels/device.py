"""Decisions that depend on the device, such as the choice of implementations and calls to ``torch.cuda``.

No other file compares devices, as ``tests/unit/test_device.py`` verifies. All choices between a CPU and an
accelerator are made with ``on_cpu``, so that ``as_accelerator`` can run the branches for accelerators on CPU tensors.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from lrm_pl.errors import InputError

logger = logging.getLogger(__name__)

#: Device types that use the CPU implementations.
HOST_TYPES: Container[str] = frozenset({"cpu"})


def on_cpu(target: Tensor | torch.device) -> bool:
    """Return whether the CPU implementation of an operation applies to a tensor or device."""
    device = target.device if isinstance(target, Tensor) else target
    return device.type in HOST_TYPES


class GpuProperties(NamedTuple):
    """Properties of a GPU that determine the choice of kernels.

    Attributes:
        capability: Compute capability.
        multiprocessors: Number of streaming multiprocessors (compute units on AMD GPUs).
        l2: Size of the L2 cache in bytes.
    """

    capability: tuple[int, int]
    multiprocessors: int
    l2: int


#: GPU that CPU tensors represent (see ``as_accelerator``).
_assumed: GpuProperties | None = None

#: Properties that are used with Triton's interpreter, which runs programs sequentially and should have few of them.
_INTERPRETED = GpuProperties((8, 0), 3, 40 * 10**6)


@contextlib.contextmanager
def as_accelerator(gpu: GpuProperties | None = None) -> Iterator[None]:
    """Return a context manager that uses the branches for accelerators on CPU tensors in the whole process.

    The tensors may be real or fake. The context manager is used to estimate the cost of a GPU step, and to test these
    branches.

    Args:
        gpu: GPU that fake tensors represent. Triton kernels are chosen as on this GPU. If None, only kernels that can
            run are chosen.
    """
    global HOST_TYPES, _assumed
    before = HOST_TYPES, _assumed
    HOST_TYPES, _assumed = frozenset(), gpu
    try:
        yield
    finally:
        HOST_TYPES, _assumed = before


def on_cuda(device: torch.device) -> bool:
    """Return whether the API of ``torch.cuda`` (CUDA or ROCm) applies to a device."""
    return device.type == "cuda"


def num_threads(device: torch.device) -> int:
    """Return the number of threads that process chunks.

    This is the number of PyTorch's intra-op threads on a CPU, and 1 on an accelerator.
    """
    return torch.get_num_threads() if on_cpu(device) else 1


def points_per_chunk(device: torch.device) -> int:
    """Return the number of points that are decoded at a time.

    The points fit in the cache of a CPU, or keep all multiprocessors of an accelerator busy.
    """
    return 32768 if on_cpu(device) else 262144


def pixels_per_group(device: torch.device) -> int:
    """Return the number of pixels that LPIPS processes at a time.

    On a CPU, this is one image of 384 x 384 pixels, for which the activations take 0.25 GB. On a GPU, this is eight
    such images.
    """
    return 384 * 384 * (1 if on_cpu(device) else 8)


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on a device has finished."""
    torch.get_device_module(device).synchronize(device)


def record_event(device: torch.device) -> torch.cuda.Event:
    """Record a timing event on the current stream of a CUDA device."""
    module = torch.get_device_module(device)
    event: torch.cuda.Event = module.Event(enable_timing=True)
    event.record(module.current_stream(device))
    return event


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Return a context manager that disables TF32 for convolutions and matrix products in the whole process.

    On GPUs of compute capability 8.0 and higher, PyTorch by default lets cuDNN round the inputs of float32
    convolutions to the 10-bit mantissa of TF32.
    """
    # Lightning and torch.compile read these settings, which raises an error if conv.fp32_precision has been set.
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    if products != "highest":  # setting it also sets oneDNN's precision
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        if products != "highest":
            torch.set_float32_matmul_precision(products)


def host_buffer(tensor: Tensor) -> Tensor:
    """Return an uninitialized CPU tensor or DTensor to copy ``tensor`` into.

    The memory is pinned if ``tensor`` is on CUDA.
    """
    return torch.empty_like(tensor, device="cpu", pin_memory=on_cuda(tensor.device))


def _streams(device: torch.device) -> Any:  # noqa: ANN401 - a module
    """Return the module that provides the streams of a device.

    If the device has no streams (MPS), ``torch.cpu`` is returned, whose streams do nothing.
    """
    module = torch.get_device_module(device)
    return module if hasattr(module, "Stream") else torch.cpu


class HostCopy:
    """Asynchronous copy of a tensor to the host.

    Only the ``numbers`` method waits for the device.
    """

    def __init__(self, tensor: Tensor) -> None:
        module = _streams(tensor.device)
        self._buffer = host_buffer(tensor).copy_(tensor.detach(), non_blocking=module is not torch.cpu)
        self._copied = module.Event()
        self._copied.record(module.current_stream(tensor.device))

    def numbers(self) -> list[float]:
        """Wait until the copy is complete, and return the elements of the tensor."""
        self._copied.synchronize()
        return self._buffer.tolist()


class CopyStream:
    """Stream for copies to the host that overlap with the work of the current stream.

    On a CPU, copies are synchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self._module, self._device = _streams(device), device
        with launch_guard(device):
            self._stream, self._copied = self._module.Stream(), self._module.Event()

    @contextlib.contextmanager
    def after_current(self) -> Iterator[None]:
        """Return a context manager that queues work on this stream after all work queued on the current stream."""
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            yield
            self._copied.record(self._stream)

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Queue a copy of ``source`` into the tensor ``into``."""
        into.copy_(source, non_blocking=self._module is not torch.cpu)

    def block_current(self) -> None:
        """Make future work on the current stream wait for the copies, without blocking the host."""
        self._copied.wait(self._module.current_stream(self._device))

    def synchronize(self) -> None:
        """Wait until the copies are complete. This method can be called from any thread."""
        self._copied.synchronize()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_unavailable(device: torch.device) -> str | None:
    """Return the reason why Triton kernels cannot run on a device, or None if they can.

    The reason is logged once. The kernels need bfloat16 tensor cores, that is, compute capability 8.0 or higher. In
    tests, Triton's interpreter runs them on CPU tensors (``TRITON_INTERPRET=1`` when the process starts).
    """
    reason = _missing_for_triton() if _assumed is None else None
    gpu = gpu_properties(device)
    if gpu is None:
        reason = f"they require a CUDA or ROCm device, not {device.type}"
    elif gpu.capability < (8, 0):
        reason = "they require compute capability 8.0 or higher, and this GPU has {}.{}".format(
            *gpu.capability
        )
    if reason is not None:
        log_once("Running without Triton kernels: %s", reason)
    return reason


@functools.cache
def log_once(message: str, reason: str) -> None:
    """Log a message that contains a reason, once per process."""
    logger.info(message, reason)


@functools.cache
def _missing_for_triton() -> str | None:
    """Return the requirement of Triton that is missing, or None if all requirements are met.

    Triton compiles C code that includes Python's headers.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    compiler = os.environ.get("CC")  # Triton interprets the whole value as the name of a program
    if not any(map(shutil.which, ("gcc", "clang") if compiler is None else (compiler,))):
        found = "none was found" if compiler is None else f"CC={compiler} is not a program"
        return f"Triton requires a C compiler, but {found}. Install gcc, and unset CC or set it to a path"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    headers = Path(sysconfig.get_path("include", scheme))
    if not (headers / "Python.h").is_file():
        return f"Triton requires Python's headers, but {headers} contains no Python.h. Install python3-dev"
    return None


def gpu_properties(device: torch.device) -> GpuProperties | None:
    """Return the properties that determine the choice of Triton kernels, or None if the device cannot run any."""
    if on_cuda(device):
        gpu = torch.cuda.get_device_properties(device)
        return GpuProperties((gpu.major, gpu.minor), gpu.multi_processor_count, gpu.L2_cache_size)
    if on_cpu(device) or _assumed is not None:
        return _assumed
    return _INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else None


def launch_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context manager that makes a CUDA device current, as launches of Triton kernels require.

    On other devices, the context manager does nothing.
    """
    return torch.cuda.device(device) if on_cuda(device) else contextlib.nullcontext()


def profiler_activities(device: torch.device) -> list[ProfilerActivity]:
    """Return the profiler activities of a device."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda(device) else [])]


def peak_device_memory(device: torch.device) -> int | None:
    """Return the peak GPU memory occupied by tensors of this process in bytes, or None if the device is not a GPU."""
    return torch.cuda.max_memory_allocated(device) if on_cuda(device) else None


def with_index(device: torch.device) -> torch.device:
    """Return a CPU device with an index, as DeepSpeed requires, or another device unchanged."""
    return torch.device("cpu", 0) if device.type == "cpu" else device


def collective_device() -> torch.device:
    """Return the device type on which the default process group reduces tensors."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


def num_visible_gpus(accelerator: str = "auto") -> int:
    """Return the number of GPUs that a Lightning accelerator setting can use on this machine.

    Args:
        accelerator: Value of ``trainer.accelerator``.
    """
    usable = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.device_count() if usable else 0


def requires_gpu(accelerator: str) -> bool:
    """Return whether a Lightning accelerator setting requires GPUs."""
    return accelerator in ("gpu", "cuda")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device with a given name.

    Args:
        name: Name of a device in PyTorch, or "auto" for a GPU if one is available, and the CPU otherwise. "auto" and
            "cuda" select a GPU by the local rank.
        local_rank: Rank of this process on its node.

    Raises:
        InputError: The device does not exist or cannot hold data.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"  # a Slurm task may see a single GPU
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(expected="a device such as cpu or cuda", found=f"{name!r}: {reason}") from error
    if device.type == "meta":
        raise InputError(expected="a device such as cpu or cuda", found="'meta', which has no data")
    return device
