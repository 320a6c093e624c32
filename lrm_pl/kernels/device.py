"""Every decision that depends on the device: which implementation runs, how work is divided, what CUDA provides.

No other file compares devices; ``tests/unit/test_device.py`` checks that. All decisions between a CPU and an
accelerator go through ``on_cpu``, so that tests can run the accelerator's branches on CPU tensors by emptying
``HOST_TYPES``.
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


def on_cpu(where: Tensor | torch.device) -> bool:
    """Return whether the CPU implementation of an operation applies to a tensor or device."""
    device = where.device if isinstance(where, Tensor) else where
    return device.type in HOST_TYPES


class GpuProperties(NamedTuple):
    """What kernels are chosen by.

    Attributes:
        capability: Compute capability.
        multiprocessors: Streaming multiprocessors (compute units).
        l2: Bytes of the L2 cache.
    """

    capability: tuple[int, int]
    multiprocessors: int
    l2: int


#: The GPU that CPU tensors stand for; see ``as_accelerator``.
_assumed: GpuProperties | None = None

#: What Triton's interpreter stands for: few programs, since it runs them one after the other.
_INTERPRETED = GpuProperties((8, 0), 3, 40 * 10**6)


@contextlib.contextmanager
def as_accelerator(gpu: GpuProperties | None = None) -> Iterator[None]:
    """Run CPU tensors, real or fake, through the branches of accelerators, for the whole process.

    The cost estimate of a GPU's step and the tests of those branches use it.

    Args:
        gpu: The GPU that fake tensors stand for; its Triton kernels are chosen as on that GPU. None chooses those that
            can run.
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
    """Return how many threads process chunks in parallel: PyTorch's number on a CPU, 1 on an accelerator."""
    return torch.get_num_threads() if on_cpu(device) else 1


def points_per_chunk(device: torch.device) -> int:
    """Return how many points are decoded at a time: a cache's worth on a CPU, enough to fill a GPU elsewhere."""
    return 32768 if on_cpu(device) else 262144


def pixels_per_group(device: torch.device) -> int:
    """Return how many pixels LPIPS measures at a time.

    An image of 384 x 384, whose activations are a quarter of a GB, on a CPU; eight of them fill a GPU.
    """
    return 384 * 384 * (1 if on_cpu(device) else 8)


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on a device."""
    torch.get_device_module(device).synchronize(device)


def record_event(device: torch.device) -> torch.cuda.Event:
    """Return a timing event in the current stream of a device of ``torch.cuda``."""
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
    # The switches that Lightning and PyTorch's compiler read; reading them raises once conv.fp32_precision is set.
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    if products != "highest":  # else untouched: setting it sets oneDNN's precision too
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
    """Return the module with a device's streams; ``torch.cpu``, whose streams do nothing, where it has none (MPS)."""
    module = torch.get_device_module(device)
    return module if hasattr(module, "Stream") else torch.cpu


class HostCopy:
    """A copy of a tensor's numbers on the host: making it does not wait for the device, reading it does."""

    def __init__(self, tensor: Tensor) -> None:
        module = _streams(tensor.device)
        self._buffer = host_buffer(tensor).copy_(tensor.detach(), non_blocking=module is not torch.cpu)
        self._copied = module.Event()
        self._copied.record(module.current_stream(tensor.device))

    def numbers(self) -> list[float]:
        """Return the numbers, once they have arrived."""
        self._copied.synchronize()
        return self._buffer.tolist()


class CopyStream:
    """A stream on which tensors are copied to the host while the current stream goes on; a no-op stream on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._module, self._device = _streams(device), device
        with launch_guard(device):
            self._stream, self._copied = self._module.Stream(), self._module.Event()

    @contextlib.contextmanager
    def after_current(self) -> Iterator[None]:
        """Queue work on this stream, after what the current stream has queued so far."""
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            yield
            self._copied.record(self._stream)

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Queue a copy."""
        into.copy_(source, non_blocking=self._module is not torch.cpu)

    def hold_back_current(self) -> None:
        """Make what the current stream queues from now on wait for the copies; the host does not wait."""
        self._copied.wait(self._module.current_stream(self._device))

    def synchronize(self) -> None:
        """Wait until the copies are complete; from any thread."""
        self._copied.synchronize()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def triton_unavailable(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device, and log it once; None where they can.

    Their products are bfloat16 on tensor cores, which GPUs have from compute capability 8.0 on. Triton's interpreter
    (``TRITON_INTERPRET=1`` when the process starts) runs them on CPU tensors, for tests.
    """
    reason = _missing_for_triton() if _assumed is None else None
    gpu = gpu_properties(device)
    if gpu is None:
        reason = f"a CUDA or ROCm device is required, this one is {device.type}"
    elif gpu.capability < (8, 0):
        reason = "compute capability 8.0 or higher is required, this GPU has {}.{}".format(*gpu.capability)
    if reason is not None:
        _log_once("running without Triton kernels: %s", reason)
    return reason


@functools.cache
def _log_once(message: str, reason: str) -> None:
    logger.info(message, reason)


@functools.cache
def _missing_for_triton() -> str | None:
    """Return what Triton would miss at its first launch, which compiles C code that includes Python's headers."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    given = os.environ.get("CC")  # Triton takes it for the whole name of a program
    if not any(map(shutil.which, ("gcc", "clang") if given is None else (given,))):
        found = "no C compiler" if given is None else f"CC={given}, which is no program"
        return f"expected a C compiler for Triton, but found {found}; install gcc, and unset CC or make it a path"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    headers = Path(sysconfig.get_path("include", scheme))
    if not (headers / "Python.h").is_file():
        return f"expected Python's headers for Triton, but found that {headers} has no Python.h; install python3-dev"
    return None


def gpu_properties(device: torch.device) -> GpuProperties | None:
    """Return what Triton's kernels are chosen by; None where the device runs none."""
    if on_cuda(device):
        found = torch.cuda.get_device_properties(device)
        return GpuProperties((found.major, found.minor), found.multi_processor_count, found.L2_cache_size)
    if on_cpu(device) or _assumed is not None:
        return _assumed
    return _INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else None


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
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(expected="a device such as cpu or cuda", found=f"{name!r}: {reason}") from error
    if device.type == "meta":
        raise InputError(expected="a device such as cpu or cuda", found="'meta', which computes nothing")
    return device
