"""Entry point of ``lrm fit | validate | test | predict``, which prints expected errors as short messages."""

import atexit
import errno
import logging
import shlex
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lrm_pl.cli.arguments import peek, run_config_arguments
from lrm_pl.cli.lightning_cli import LRMCLI, Command, one_line
from lrm_pl.errors import InputError
from lrm_pl.kernels.device import num_visible_gpus
from lrm_pl.planning.gpus import gpu_of_name
from lrm_pl.planning.memory import memory_of_libraries
from lrm_pl.training.checkpointing import NO_SPACE_ERRORS, StoppedError
from lrm_pl.training.processes import wait_for_gloo_threads

#: Exit status (EX_TEMPFAIL) of a run that was stopped by a signal and can be resumed.
STOPPED_STATUS = 75

#: Error numbers for read-only file systems and missing permissions.
_NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM)

#: Substrings of the PyTorch error messages that indicate that /dev/shm is full.
_SHARED_MEMORY_MESSAGES = ("unable to allocate shared memory", "out of shared memory")

#: Substrings of the messages of out-of-memory errors that are plain ``RuntimeError`` exceptions.
_MEMORY_MESSAGES = ("can't allocate memory", "std::bad_alloc", "CUDA error: out of memory", "ALLOC_FAILED")

#: Patterns of warnings that do not apply to this project.
_IGNORED_WARNINGS = (
    # The stream assigns whole batches to the workers in turn and reports the correct length.
    "Your `IterableDataset` has `__len__` defined",
    # Jobs are started with `make train NODES=` instead.
    "The `srun` command is available",
    # Validation metrics are reduced over ranks before they are logged.
    "It is recommended to use `self.log",
    # Lightning 2.6.6 itself uses this deprecated name.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # The triplane is such a view, but it is never modified in place.
    r"FSDP2-wrapped module \(FSDPLRM\) returned a view tensor",
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and print expected errors as one message instead of a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    advertising = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertising.addFilter(lambda record: "litlogger" not in record.getMessage())
    for pattern in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", pattern)
    atexit.register(wait_for_gloo_threads)
    memory_of_libraries()  # must be measured before the network is created
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _report_unless_disk_full
    words = sys.argv[1:] if arguments is None else arguments
    try:
        command_line(words)
    except StoppedError as stopped:
        sys.stderr.write(f"lrm: {stopped}\n")
        sys.exit(STOPPED_STATUS)
    except (InputError, MisconfigurationException, OSError, RuntimeError, MemoryError) as error:
        message = _message(error, words)
        if message is None:
            raise
        sys.exit(f"lrm: {message}")


def command_line(arguments: list[str]) -> LRMCLI:
    """Parse and run a command.

    Args:
        arguments: Name of the command, followed by its arguments.
    """
    command, *rest = arguments
    if command == "fit" and peek(rest, "ckpt_path")["ckpt_path"] is not None:
        raise InputError(
            "lrm fit does not accept --ckpt_path",
            remedy="use --run.folder to resume a run, or --run.resume PATH to start a new run from a checkpoint",
        )
    if command != "fit":
        rest = [*run_config_arguments(rest), *rest]
    cli = LRMCLI(cast(Command, command), rest)
    cli.run()
    return cli


def _message(error: Exception, arguments: list[str]) -> str | None:
    """Return the message for an expected error, or None if the error is not expected."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _NO_ACCESS:
        return (
            f"no access to a file of the run: {one_line(error)}. Give this user access to the file, or choose another "
            "folder with --run.folder"
        )
    if isinstance(error, OSError) and error.errno in NO_SPACE_ERRORS:
        return (
            f"no space left for files of the run: {one_line(error)}. Free space and start the same command again "
            "with --run.folder to resume from the newest complete checkpoint"
        )
    if isinstance(error, OSError):
        return None
    if any(text in str(error) for text in _SHARED_MEMORY_MESSAGES):
        return "/dev/shm is full. Start the container with --shm-size=8g, or use --data.workers 0"
    # Lightning raises a RuntimeError for a missing metric of EarlyStopping.
    if isinstance(error, MisconfigurationException) or str(error).startswith("Early stopping conditioned on"):
        return one_line(error)
    if is_out_of_memory(error) and arguments[0] == "fit":
        return out_of_memory_message(error, arguments[1:])
    return None


def _report_unless_disk_full(args: threading.ExceptHookArgs) -> None:
    """Report an uncaught exception in a thread, unless it indicates a full disk.

    The threads of loggers pass errors about a full disk to the main thread.
    """
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in NO_SPACE_ERRORS):
        threading.__excepthook__(args)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports that a GPU, PyTorch's CPU allocator or Python is out of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_MESSAGES)
    )


def out_of_memory_message(error: BaseException, arguments: Sequence[str]) -> str:
    """Return the message for an out-of-memory error, including a command that lists settings that use less memory.

    Args:
        error: The error.
        arguments: Arguments of ``lrm fit``.
    """
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    command = ["lrm", "estimate", "--less-memory", *_gpu_options(), *arguments]
    return f"out of memory: {first_line}\nTo list settings that reduce memory, run:\n  {shlex.join(command)}"


def _gpu_options() -> list[str]:
    if not num_visible_gpus():
        return []
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    gpu = gpu_of_name(torch.cuda.get_device_name())
    return ["--gpus", str(processes), *(["--gpu", gpu.name] if gpu else [])]
