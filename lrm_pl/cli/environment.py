"""Selection of Lightning's cluster environment for processes that torchrun or Slurm started."""

import os

import lightning as L
from lightning.pytorch.plugins.environments import (  # type: ignore[attr-defined]
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities import rank_zero_only

from lrm_pl.errors import InputError
from lrm_pl.training.processes import num_srun_tasks, unexpected_rank_message


def cluster_environment() -> ClusterEnvironment | None:
    """Return the environment plugin for torchrun or Slurm, or None if Lightning should choose.

    Lightning itself treats every process inside a Slurm allocation as an srun task, including notebooks, shells and
    processes that torchrun started, except in jobs named ``interactive`` or ``bash``.

    Raises:
        InputError: The nodes have different numbers of tasks.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if num_srun_tasks() == 1:
        return LightningEnvironment() if SLURMEnvironment.detect() else None
    per_node, _, repeats = (tasks := os.environ["SLURM_STEP_TASKS_PER_NODE"]).partition("(")
    if not per_node.isdecimal() or "," in repeats:
        raise InputError(
            expected="the same number of srun tasks on each node", found=tasks, remedy="use --ntasks-per-node"
        )
    # Lightning requires this variable to equal trainer.devices. The value for the allocation may differ from the value
    # for the step.
    os.environ["SLURM_NTASKS_PER_NODE"] = per_node
    return SLURMEnvironment(auto_requeue=False)


def require_started_together(trainer: L.Trainer) -> None:
    """Check that the launcher started as many processes as the trainer expects.

    Raises:
        InputError: The launcher started a different number of processes, or the other nodes were not started.
    """
    devices, nodes = trainer.num_devices, trainer.num_nodes
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise InputError(
            expected=f"{nodes} nodes that were started together",
            found="only this node",
            remedy="start the nodes with make train NODES=, srun or torchrun, or use --trainer.num_nodes 1",
        )
    if TorchElasticEnvironment.detect():
        launcher, started = "torchrun", int(os.environ.get("WORLD_SIZE", 1))
    elif num_srun_tasks() > 1:
        launcher, started = "srun", num_srun_tasks()
    elif "OMPI_COMM_WORLD_SIZE" in os.environ:
        launcher, started = "mpirun", int(os.environ["OMPI_COMM_WORLD_SIZE"])
    else:
        _require_own_rank(trainer)
        return
    if started not in (1, devices * nodes):
        raise InputError(
            expected=f"{devices * nodes} processes (trainer.devices {devices} x trainer.num_nodes {nodes})",
            found=f"{started} processes, which {launcher} started",
            remedy=(
                f"add -c configs/trainer/ddp.yaml --trainer.devices {started // nodes or 1}, or start one process "
                "per device"
            ),
        )


def _require_own_rank(trainer: L.Trainer) -> None:
    """Reject rank-related environment variables that contradict the trainer, because loggers read them.

    Raises:
        InputError: The variables differ from the trainer's rank and world size.
    """
    rank, world = trainer.global_rank, trainer.num_devices * trainer.num_nodes
    variables = LightningEnvironment()
    if (
        variables.local_rank() >= trainer.num_devices
        or variables.node_rank() >= trainer.num_nodes
        or int(os.environ.get("RANK", 0)) not in (0, rank)
        or int(os.environ.get("WORLD_SIZE", 1)) not in (1, world)
        or rank_zero_only.rank != rank  # type: ignore[attr-defined]
    ):
        raise InputError(unexpected_rank_message(rank, world))
