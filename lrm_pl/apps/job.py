"""A run on several processes, and the text that starts it: Slurm's job script, or torchrun's command lines."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.apps import slurm

STRATEGIES = Path("configs/trainer")
PORT = 29500
FIRST_NODE = "FIRST_NODE"


@dataclasses.dataclass(frozen=True)
class Launch:
    """A run on several processes.

    Attributes:
        nodes: Machines.
        processes: Processes a machine; with GPUs, one a GPU.
        gpus: GPUs a machine; 0 means CPU processes with gloo.
        configs: Layers of the config, the last wins.
        strategy: The layer of ``configs/trainer`` that comes on top of them.
        data: Folder of the shards.
        run: Folder of the run: a job that starts again comes back to it.
        arguments: More arguments of `lrm fit`.
    """

    nodes: int
    processes: int
    gpus: int
    configs: tuple[str, ...]
    strategy: str
    data: str
    run: Path
    arguments: tuple[str, ...]

    def fit(self) -> list[str]:
        """Return the arguments of ``python`` that train."""
        layers = [*self.configs, str(STRATEGIES / f"{self.strategy}.yaml")]
        return [
            *("-m", "lrm_pl", "fit"),
            *(word for layer in layers for word in ("-c", layer)),
            *("--trainer.num_nodes", str(self.nodes), "--trainer.devices", str(self.processes)),
            # Said in either case: else a node whose GPUs are not seen would train on its CPUs.
            *("--trainer.accelerator", "gpu" if self.gpus else "cpu"),
            *("--data.folder", self.data, "--run.folder", str(self.run)),
            *self.arguments,
        ]


def job_script(
    launch: Launch,
    program: Sequence[str],
    *,
    cpus: int,
    cache: Path,
    partition: str = "",
    account: str = "",
    time: str = "24:00:00",
    container: str = "",
) -> str:
    """Fill the template of the job.

    Args:
        launch: The run.
        program: The command of each process.
        cpus: CPUs a process.
        cache: Where weights are kept.
        partition: Slurm's partition; "" leaves it to Slurm.
        account: Who pays; "" leaves it to Slurm.
        time: Limit of one start of the job.
        container: Image to run in; "" means none.
    """
    options = slurm.container_options(container, [launch.data, launch.run.parent, cache])
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


def node_lines(launch: Launch, master: str) -> list[str]:
    """Return the line to paste on each node, in their order; only the node's rank differs."""
    host, _, port = (slurm.checked("master", master) or FIRST_NODE).partition(":")
    meeting = ("--master-addr", host, "--master-port", port or str(PORT))
    return [
        slurm.quoted(torchrun(launch, "--nnodes", str(launch.nodes), "--node-rank", str(rank), *meeting))
        for rank in range(launch.nodes)
    ]
