"""Detection of processes started by torchrun or srun, and launching of a command in several local processes."""

import logging
import os
import sys
import time
import uuid
from collections.abc import Sequence
from typing import NoReturn

from lrm_pl.errors import InputError
from lrm_pl.scratch import ScratchFolder

#: Seconds that processes have to save a checkpoint after a signal before they are killed.
GRACE_S = 120

#: Seconds that gloo's threads have to acquire the interpreter lock and release their tensors. They usually need a few
#: milliseconds.
_GLOO_RELEASE_S = 0.2


def is_srun_task() -> bool:
    """Return whether this process is a task started by Slurm's srun.

    Notebooks in an allocation and shells started by ``srun --pty`` are not considered tasks. Such a shell has the
    environment variables of a task, and tasks started from the shell inherit these variables. Only the shell has a
    terminal.
    """
    return "SLURM_STEP_NUM_TASKS" in os.environ and not ("SLURM_PTY_PORT" in os.environ and _has_terminal())


def num_srun_tasks() -> int:
    """Return the number of tasks in the srun step of this process, or 1 if srun did not start this process."""
    return int(os.environ["SLURM_STEP_NUM_TASKS"]) if is_srun_task() else 1


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank and world size set by torchrun or srun, or (0, 1) if neither started this process.

    Raises:
        InputError: RANK or WORLD_SIZE is set, but torchrun did not start this process.
    """
    rank, world = (int(os.environ.get(name, least)) for name, least in (("RANK", 0), ("WORLD_SIZE", 1)))
    if is_torchrun_process():
        return rank, world
    if (rank, world) != (0, 1):
        raise InputError(unexpected_rank_message(0, 1))
    return (int(os.environ["SLURM_PROCID"]), num_srun_tasks()) if is_srun_task() else (0, 1)


def unexpected_rank_message(rank: int, world: int) -> str:
    """Return the error message for a process that has rank variables but was not started by a launcher."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "SLURM_PROCID")
    found = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return (
        f"Expected process {rank} of {world}, but found {found} in the environment without torchrun or srun. Start the "
        "processes with torchrun or srun, or unset these variables"
    )


def is_torchrun_process() -> bool:
    """Return whether torchrun or ``launch_processes`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_distributed_process() -> bool:
    """Return whether a launcher started this process as one of several processes."""
    return is_torchrun_process() or num_srun_tasks() > 1


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def launch_processes(count: int, arguments: Sequence[str]) -> NoReturn:
    """Run ``python -m lrm_pl ARGUMENTS`` in several local processes, and exit when they have ended.

    The exit status is 0 if all processes succeed, and otherwise the exit status of the first process that fails.

    Args:
        count: Number of processes.
        arguments: Command-line arguments.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # these loggers print a traceback per failed process
            logging.getLogger(name).setLevel(logging.CRITICAL)
    scratch = ScratchFolder("lrm-processes-")  # torchrun does not delete the log folder that it creates
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1, shutdown_timeout=GRACE_S,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # the defaults, and SIGUSR1, which Slurm sends
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch.path)),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "lrm_pl", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if failure.exitcode < 0:
            sys.stderr.write(f"lrm: process {rank} of {count} was terminated by signal {-failure.exitcode}\n")
        sys.exit(status)
    except SignalException as error:  # the processes have exited and printed their own messages
        sys.exit(128 + error.sigval)
    finally:
        scratch.remove()
    sys.exit(0)


def wait_for_gloo_threads() -> None:
    """Wait for gloo's threads to release the tensors of the last collectives. Register this with ``atexit``.

    A thread that releases a tensor while the interpreter shuts down is terminated inside a C++ destructor, which
    aborts the process with SIGABRT ("terminate called without an active exception"). In a test without this wait,
    8 of 40 programs that exited directly after a collective were aborted. Destroying the process groups does not join
    the threads while a device mesh refers to the groups (https://github.com/pytorch/pytorch/issues/190489).
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(_GLOO_RELEASE_S)  # releases the interpreter lock, which the threads need
