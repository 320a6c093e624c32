"""A training run on several processes, and the commands that start it: sbatch or torchrun."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.cluster import slurm

STRATEGIES = Path("configs/trainer")
JOB_SCRIPT = Path("configs/cluster/slurm.sbatch")
PORT = 29500

#: Placeholders for the first node's address and for a node's rank in printed commands.
FIRST_NODE, NODE_RANK = "FIRST_NODE", "NODE_RANK"


@dataclasses.dataclass(frozen=True)
class Launch:
    """A training run on several processes.

    Attributes:
        nodes: Number of nodes.
        processes: Processes per node; with GPUs, one per GPU.
        gpus: GPUs per node; 0 trains on CPUs with Gloo.
        base_strategy: Layer of ``configs/trainer`` below the config, which may override it.
        configs: Config layers; later ones override earlier ones.
        strategy: Layer of ``configs/trainer`` on top of the config; "" is none.
        data: Folder of the shards; "" uses the config's.
        run: Folder of the run, to which a restarted job returns.
        arguments: Additional arguments of `lrm fit`.
    """

    nodes: int
    processes: int
    gpus: int
    base_strategy: str
    configs: tuple[str, ...]
    strategy: str
    data: str
    run: Path
    arguments: tuple[str, ...]

    def fit_command(self) -> list[str]:
        """Return the arguments of ``python`` that run `lrm fit`."""
        return ["-m", "lrm_pl", "fit", *self.fit_arguments()]

    def fit_arguments(self) -> list[str]:
        """Return the arguments of `lrm fit`."""
        below, above = (
            [str(STRATEGIES / f"{name}.yaml")] if name else [] for name in (self.base_strategy, self.strategy)
        )
        return [
            *(word for layer in [*below, *self.configs, *above] for word in ("-c", layer)),
            *("--trainer.num_nodes", str(self.nodes), "--trainer.devices", str(self.processes)),
            # Explicit, since a node whose GPUs are not visible would otherwise train on its CPUs.
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
    partition: str = "",
    account: str = "",
    time: str = "24:00:00",
    container: str = "",
    mounts: Sequence[str | Path] = (),
) -> list[str]:
    """Return the command that submits a run to Slurm.

    Args:
        launch: The run.
        program: Command of each process.
        cpus: CPUs per process, or a placeholder.
        cache: Folder of downloaded weights.
        partition: Slurm partition; "" is Slurm's default.
        account: Slurm account; "" is Slurm's default.
        time: Time limit of one start of the job.
        container: Container image; "" is none.
        mounts: Folders to mount in the container besides the working folder, the runs and the cache.
    """
    options: dict[str, str | int] = {
        "job-name": slurm.checked("name", launch.run.name),
        "nodes": launch.nodes,
        "ntasks-per-node": launch.processes,
        "cpus-per-task": cpus,
        "gres": f"gpu:{launch.gpus}" if launch.gpus else "",
        "partition": partition,
        "account": account,
        "time": time,
        "output": f"{launch.run.as_posix()}/slurm-%j.log",
    }
    step = slurm.container_options(container, [*mounts, launch.run.parent, cache])
    return slurm.sbatch_command(JOB_SCRIPT, options, [str(launch.run), str(cache), *step, *program])


def torchrun_command(launch: Launch, *rendezvous: str) -> list[str]:
    """Return the command that starts the processes of one node.

    Args:
        launch: The run.
        rendezvous: Options of torchrun that locate the other nodes.
    """
    processes = ("--nproc-per-node", str(launch.processes))
    return [sys.executable, "-m", "torch.distributed.run", *rendezvous, *processes, *launch.fit_command()]


def node_command(launch: Launch, master: str, rank: int | str = NODE_RANK) -> str:
    """Return the shell command to run on a node.

    Args:
        launch: The run.
        master: Address of the first node, optionally with a port; "" prints a placeholder.
        rank: Rank of the node, or a placeholder.
    """
    host, _, port = (slurm.checked("master", master) or FIRST_NODE).partition(":")
    address = ("--master-addr", host, "--master-port", port or str(PORT))
    return slurm.quoted(
        torchrun_command(launch, "--nnodes", str(launch.nodes), "--node-rank", str(rank), *address)
    )
