"""A run on several processes, and the text that starts it: Slurm's job script, or torchrun's command lines."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.cluster import slurm

STRATEGIES = Path("configs/trainer")
PORT = 29500
FIRST_NODE = "FIRST_NODE"
NODE_RANK = "NODE_RANK"


@dataclasses.dataclass(frozen=True)
class Launch:
    """A run on several processes.

    Attributes:
        nodes: Machines.
        processes: Processes a machine; with GPUs, one a GPU.
        gpus: GPUs a machine; 0 means CPU processes with gloo.
        below: The layer of ``configs/trainer`` that the config may change.
        configs: Layers of the config, the last wins.
        strategy: The layer of ``configs/trainer`` that was asked for, and comes on top of them; "" means none.
        data: Folder of the shards; "" leaves it to the config.
        run: Folder of the run: a job that starts again comes back to it.
        arguments: More arguments of `lrm fit`.
    """

    nodes: int
    processes: int
    gpus: int
    below: str
    configs: tuple[str, ...]
    strategy: str
    data: str
    run: Path
    arguments: tuple[str, ...]

    def fit(self) -> list[str]:
        """Return the arguments of ``python`` that train."""
        return ["-m", "lrm_pl", "fit", *self.fit_arguments()]

    def fit_arguments(self) -> list[str]:
        """Return the arguments of `lrm fit`."""
        first, last = (
            [str(STRATEGIES / f"{name}.yaml")] if name else [] for name in (self.below, self.strategy)
        )
        return [
            *(word for layer in [*first, *self.configs, *last] for word in ("-c", layer)),
            *("--trainer.num_nodes", str(self.nodes), "--trainer.devices", str(self.processes)),
            # Said in either case: else a node whose GPUs are not seen would train on its CPUs.
            *("--trainer.accelerator", "gpu" if self.gpus else "cpu"),
            *(("--data.folder", self.data) if self.data else ()),
            *("--run.folder", str(self.run)),
            *self.arguments,
        ]


def job_script(
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
) -> str:
    """Fill the template of the job.

    Args:
        launch: The run.
        program: The command of each process.
        cpus: CPUs a process, or what stands for their number where Slurm cannot be asked.
        cache: Where weights are kept.
        partition: Slurm's partition; "" leaves it to Slurm.
        account: Who pays; "" leaves it to Slurm.
        time: Limit of one start of the job.
        container: Image to run in; "" means none.
        mounts: What it must see beside the working folder, the runs and the cache: the data.
    """
    options = slurm.container_options(container, [*mounts, launch.run.parent, cache])
    values = {
        "name": slurm.checked("name", launch.run.name),
        "nodes": str(launch.nodes),
        "processes": str(launch.processes),
        "cpus": str(cpus),
        "gres": f"gpu:{launch.gpus}" if launch.gpus else "",
        "partition": slurm.checked("partition", partition),
        "account": slurm.checked("account", account),
        "time": slurm.checked("time", time),
        "run": launch.run.as_posix(),
        "cache": slurm.quoted([str(cache)]),
        "container": " " + slurm.quoted(options) if options else "",
        "command": slurm.quoted(program),
    }
    return slurm.fill(slurm.read_template(slurm.TEMPLATE), values)


def torchrun(launch: Launch, *place: str) -> list[str]:
    """Return the command that starts one node's processes; ``place`` are torchrun's options of where it is."""
    per_node = ("--nproc-per-node", str(launch.processes))
    return [sys.executable, "-m", "torch.distributed.run", *place, *per_node, *launch.fit()]


def node_line(launch: Launch, master: str, rank: int | str = NODE_RANK) -> str:
    """Return the line to paste on a node.

    Args:
        launch: The run.
        master: Address of the first node, with or without a port; "" leaves a word that stands for it.
        rank: The node's number, from 0 on, or a word that stands for it.
    """
    host, _, port = (slurm.checked("master", master) or FIRST_NODE).partition(":")
    meeting = ("--master-addr", host, "--master-port", port or str(PORT))
    return slurm.quoted(torchrun(launch, "--nnodes", str(launch.nodes), "--node-rank", str(rank), *meeting))
