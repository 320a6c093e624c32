"""Several processes of a command on this machine, as torchrun starts them; their messages are the last thing said."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from typing import NoReturn

from lrm_pl.errors import InputError
from lrm_pl.scratch import ScratchFolder

#: Seconds that processes have to keep their work after a signal, before they are killed.
GRACE_S = 120


def is_task_of_srun() -> bool:
    """Return whether this process is a task of Slurm's srun, not a notebook in an allocation or a shell of srun --pty.

    Such a shell has the variables of a task, however many tasks were asked for with it, and hands them on to what
    srun starts from it; but only the shell has a terminal.
    """
    return "SLURM_STEP_NUM_TASKS" in os.environ and not ("SLURM_PTY_PORT" in os.environ and _has_terminal())


def tasks_of_srun() -> int:
    """Return how many tasks srun started together with this process, itself included; 1 where it started none."""
    return int(os.environ["SLURM_STEP_NUM_TASKS"]) if is_task_of_srun() else 1


def rank_and_world_size() -> tuple[int, int]:
    """Return the rank and the world size that torchrun or srun set, or (0, 1) without either.

    Raises:
        InputError: RANK or WORLD_SIZE is set, but not by torchrun.
    """
    rank, world = (int(os.environ.get(name, least)) for name, least in (("RANK", 0), ("WORLD_SIZE", 1)))
    if in_torchrun():
        return rank, world
    if (rank, world) != (0, 1):
        raise InputError(foreign_rank_message(0, 1))
    return (int(os.environ["SLURM_PROCID"]), tasks_of_srun()) if is_task_of_srun() else (0, 1)


def foreign_rank_message(rank: int, world: int) -> str:
    """Return the message for rank variables in the environment that no launcher set for this process."""
    names = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "SLURM_PROCID")
    found = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    return (
        f"expected process {rank} of {world}, but found {found} in the environment without torchrun or srun; start the "
        "processes with torchrun or srun, or unset these variables"
    )


def in_torchrun() -> bool:
    """Return whether torchrun started this process, or ``run_processes``."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def in_group() -> bool:
    """Return whether this is one of several processes already."""
    return in_torchrun() or tasks_of_srun() > 1


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def run_processes(count: int, arguments: Sequence[str]) -> NoReturn:
    """Run ``python -m lrm_pl ...`` in so many processes, and end as the first that failed.

    Args:
        count: Processes.
        arguments: After ``lrm``.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # a page for each process that fails
            logging.getLogger(name).setLevel(logging.CRITICAL)
    scratch = ScratchFolder("lrm-processes-")  # torchrun's own stays where it is
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1, shutdown_timeout=GRACE_S,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",  # torchrun's, and what batch systems warn with
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch.path)),
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "lrm_pl", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if failure.exitcode < 0:
            sys.stderr.write(f"lrm: process {rank} of {count} was ended by signal {-failure.exitcode}\n")
        sys.exit(status)
    except SignalException as error:  # the processes have ended, and said what they keep
        sys.exit(128 + error.sigval)
    finally:
        scratch.remove()
    sys.exit(0)
