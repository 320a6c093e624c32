"""Description of a training run on several processes, and the sbatch and torchrun commands that start the run."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.cluster import slurm

STRATEGIES = Path("configs/trainer")
JOB_SCRIPT = Path("configs/cluster/slurm.sbatch")
PORT = 29500

#: Placeholders in printed commands for the address of the first node and for the rank of a node.
FIRST_NODE, NODE_RANK = "FIRST_NODE", "NODE_RANK"


@dataclasses.dataclass(frozen=True)
class Launch:
    """A training run on several processes.

    Attributes:
        nodes: Number of nodes.
        processes: Number of processes per node. On GPUs, it equals the number of GPUs.
        gpus: Number of GPUs per node. If 0, the run trains on CPUs.
        layers: Paths of config files. Later files override earlier ones.
        data: Folder of the shards. If "", the folder in the config is used.
        run: Folder of the run. A restarted job resumes the run in this folder.
        arguments: Additional arguments of ``lrm fit``.
    """

    nodes: int
    processes: int
    gpus: int
    layers: tuple[str, ...]
    data: str
    run: Path
    arguments: tuple[str, ...]

    def fit_command(self) -> list[str]:
        """Return the arguments of ``python`` that run ``lrm fit``."""
        return ["-m", "lrm_pl", "fit", *self.fit_arguments()]

    def fit_arguments(self) -> list[str]:
        """Return the arguments of ``lrm fit``."""
        return [
            *(word for layer in self.layers for word in ("-c", layer)),
            *("--trainer.num_nodes", str(self.nodes), "--trainer.devices", str(self.processes)),
            # The accelerator is explicit because a node without visible GPUs would otherwise train on CPUs.
            *("--trainer.accelerator", "gpu" if self.gpus else "cpu"),
            *(("--data.folder", self.data) if self.data else ()),
            *("--run.folder", str(self.run)),
            *self.arguments,
        ]


def sbatch_command(
    launch: Launch,
    program: Sequence[str],
    *,
    cpus: int | str,
    cache: Path,
    container: str = "",
    mounts: Sequence[str | Path] = (),
    **options: str,
) -> list[str]:
    """Return the command that submits a run to Slurm.

    Args:
        launch: The run.
        program: Command that each process executes.
        cpus: Number of CPUs per process, or a placeholder.
        cache: Folder of downloaded weights.
        container: Container image. If "", no container is used.
        mounts: Folders to mount in the container, in addition to the working folder, the runs and the cache.
        options: Values of other long options of sbatch, such as ``partition``. Empty values are omitted.
    """
    sbatch_options: dict[str, str | int] = {
        "job-name": slurm.checked("name", launch.run.name),
        "nodes": launch.nodes,
        "ntasks-per-node": launch.processes,
        "cpus-per-task": cpus,
        "gres": f"gpu:{launch.gpus}" if launch.gpus else "",
        **options,
        "output": f"{launch.run.as_posix()}/slurm-%j.log",
    }
    step = slurm.container_options(container, [*mounts, launch.run.parent, cache])
    return slurm.sbatch_command(JOB_SCRIPT, sbatch_options, [str(launch.run), str(cache), *step, *program])


def torchrun_command(launch: Launch, *rendezvous: str) -> list[str]:
    """Return the torchrun command that starts the processes of one node.

    Args:
        launch: The run.
        rendezvous: Options of torchrun that specify how the nodes find each other.
    """
    processes = ("--nproc-per-node", str(launch.processes))
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, *processes, *launch.fit_command()]


def node_command(launch: Launch, master: str, rank: int | str = NODE_RANK) -> str:
    """Return the shell command that starts the processes of one node.

    Args:
        launch: The run.
        master: Address of the first node, optionally with a port. If "", the command contains a placeholder.
        rank: Rank of the node, or a placeholder.
    """
    host, _, port = (slurm.checked("master", master) or FIRST_NODE).partition(":")
    address = ("--master-addr", host, "--master-port", port or str(PORT))
    return slurm.quoted(
        torchrun_command(launch, "--nnodes", str(launch.nodes), "--node-rank", str(rank), *address)
    )
