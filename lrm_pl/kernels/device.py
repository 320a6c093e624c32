"""Device-dependent decisions: which implementation runs, how work is divided, and the API of ``torch.cuda``.

No other file compares devices (``tests/unit/test_device.py``). All choices between a CPU and an accelerator go through
``on_cpu``, so that ``as_accelerator`` can run the accelerator's branches on CPU tensors.
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

#: Device types served by the CPU implementations.
HOST_TYPES: Container[str] = frozenset({"cpu"})


def on_cpu(target: Tensor | torch.device) -> bool:
    """Return whether the CPU implementation of an operation applies to a tensor or device."""
    device = target.device if isinstance(target, Tensor) else target
    return device.type in HOST_TYPES


class GpuProperties(NamedTuple):
    """Properties of a GPU that determine the choice of kernels.

    Attributes:
        capability: Compute capability.
        multiprocessors: Streaming multiprocessors (compute units).
        l2: Bytes of the L2 cache.
    """

    capability: tuple[int, int]
    multiprocessors: int
    l2: int


#: GPU that CPU tensors represent; see ``as_accelerator``.
_assumed: GpuProperties | None = None

#: Properties used with Triton's interpreter: few programs, since it runs them sequentially.
_INTERPRETED = GpuProperties((8, 0), 3, 40 * 10**6)


@contextlib.contextmanager
def as_accelerator(gpu: GpuProperties | None = None) -> Iterator[None]:
    """Run CPU tensors, real or fake, through the branches of accelerators, for the whole process.

    Used by the cost estimate of a GPU step and by tests of those branches.

    Args:
        gpu: GPU that fake tensors represent; Triton kernels are chosen as on this GPU. None chooses kernels that can
            run.
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
    """Return the number of threads that process chunks: PyTorch's intra-op threads on a CPU, 1 on an accelerator."""
    return torch.get_num_threads() if on_cpu(device) else 1


def points_per_chunk(device: torch.device) -> int:
    """Return the number of points decoded at a time: fits the cache on a CPU, fills the device elsewhere."""
    return 32768 if on_cpu(device) else 262144


def pixels_per_group(device: torch.device) -> int:
    """Return the number of pixels that LPIPS processes at a time.

    One 384 x 384 image on a CPU, whose activations take 0.25 GB; eight on a GPU.
    """
    return 384 * 384 * (1 if on_cpu(device) else 8)


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on a device has finished."""
    torch.get_device_module(device).synchronize(device)


def record_event(device: torch.device) -> torch.cuda.Event:
    """Record a timing event in the current stream of a CUDA device."""
    module = torch.get_device_module(device)
    event: torch.cuda.Event = module.Event(enable_timing=True)
    event.record(module.current_stream(device))
    return event


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products in float32, for the whole process; restored on exit.

    By default, PyTorch lets cuDNN round the factors of float32 convolutions to TF32's 10 bits of mantissa on GPUs of
    compute capability 8.0 and higher.
    """
    # Lightning and torch.compile read these switches, which raises if conv.fp32_precision has been set.
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
    """Return an uninitialized CPU tensor (or DTensor) to copy ``tensor`` into; pinned if that is on CUDA."""
    return torch.empty_like(tensor, device="cpu", pin_memory=on_cuda(tensor.device))


def _streams(device: torch.device) -> Any:  # noqa: ANN401 - a module
    """Return the module with a device's streams; ``torch.cpu``, with no-op streams, if it has none (MPS)."""
    module = torch.get_device_module(device)
    return module if hasattr(module, "Stream") else torch.cpu


class HostCopy:
    """Asynchronous copy of a tensor to the host; only ``numbers`` waits for the device."""

    def __init__(self, tensor: Tensor) -> None:
        module = _streams(tensor.device)
        self._buffer = host_buffer(tensor).copy_(tensor.detach(), non_blocking=module is not torch.cpu)
        self._copied = module.Event()
        self._copied.record(module.current_stream(tensor.device))

    def numbers(self) -> list[float]:
        """Wait for the copy and return its elements."""
        self._copied.synchronize()
        return self._buffer.tolist()


class CopyStream:
    """A stream for copies to the host that overlap with the current stream; a no-op on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._module, self._device = _streams(device), device
        with launch_guard(device):
            self._stream, self._copied = self._module.Stream(), self._module.Event()

    @contextlib.contextmanager
    def after_current(self) -> Iterator[None]:
        """Queue work on this stream, after all work queued on the current stream so far."""
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            yield
            self._copied.record(self._stream)

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Queue a copy."""
        into.copy_(source, non_blocking=self._module is not torch.cpu)

    def block_current(self) -> None:
        """Make future work of the current stream wait for the copies, without blocking the host."""
        self._copied.wait(self._module.current_stream(self._device))

    def synchronize(self) -> None:
        """Wait until the copies are complete; from any thread."""
        self._copied.synchronize()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_unavailable(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device, and log it once; None if they can.

    The kernels need bfloat16 tensor cores, that is, compute capability 8.0. Triton's interpreter
    (``TRITON_INTERPRET=1`` at process start) runs them on CPU tensors, for tests.
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
        _log_once("Running without Triton kernels: %s", reason)
    return reason


@functools.cache
def _log_once(message: str, reason: str) -> None:
    logger.info(message, reason)


@functools.cache
def _missing_for_triton() -> str | None:
    """Return which requirement of Triton is missing: it compiles C code that includes Python's headers."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    compiler = os.environ.get("CC")  # Triton takes the whole value for the name of a program
    if not any(map(shutil.which, ("gcc", "clang") if compiler is None else (compiler,))):
        found = "none was found" if compiler is None else f"CC={compiler} is not a program"
        return f"Triton requires a C compiler, but {found}. Install gcc, and unset CC or set it to a path"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    headers = Path(sysconfig.get_path("include", scheme))
    if not (headers / "Python.h").is_file():
        return f"Triton requires Python's headers, but {headers} contains no Python.h. Install python3-dev"
    return None


def gpu_properties(device: torch.device) -> GpuProperties | None:
    """Return the properties that determine the choice of Triton kernels; None if the device cannot run any."""
    if on_cuda(device):
        gpu = torch.cuda.get_device_properties(device)
        return GpuProperties((gpu.major, gpu.minor), gpu.multi_processor_count, gpu.L2_cache_size)
    if on_cpu(device) or _assumed is not None:
        return _assumed
    return _INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else None


def launch_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device current, which Triton launches require; a no-op elsewhere."""
    return torch.cuda.device(device) if on_cuda(device) else contextlib.nullcontext()


def profiler_activities(device: torch.device) -> list[ProfilerActivity]:
    """Return the profiler activities of a device."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda(device) else [])]


def peak_device_memory(device: torch.device) -> int | None:
    """Return the peak GPU memory allocated by tensors of this process, in bytes; None without a GPU."""
    return torch.cuda.max_memory_allocated(device) if on_cuda(device) else None


def with_index(device: torch.device) -> torch.device:
    """Return a CPU device with an index, as DeepSpeed requires; any other device unchanged."""
    return torch.device("cpu", 0) if device.type == "cpu" else device


def collective_device() -> torch.device:
    """Return the device type on which the default process group reduces tensors."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")


def num_visible_gpus(accelerator: str = "auto") -> int:
    """Return the number of GPUs that a Lightning accelerator setting can use on this machine.

    Args:
        accelerator: ``trainer.accelerator``.
    """
    usable = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.device_count() if usable else 0


def requires_gpu(accelerator: str) -> bool:
    """Return whether a Lightning accelerator setting requires GPUs."""
    return accelerator in ("gpu", "cuda")


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return a device by name.

    Args:
        name: PyTorch's name of a device. "auto" is a GPU if one is available; "auto" and "cuda" select one GPU per
            local rank.
        local_rank: Rank of this process on its node.

    Raises:
        InputError: The device does not exist.
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
