"""Start `lrm fit` in multiple processes with Slurm or torchrun (`make train NODES= GPUS=`).

If Slurm is installed, the command submits the job script configs/cluster/slurm.sbatch. Otherwise, the command starts
the processes of one node, or prints the command to run on each of several nodes.
"""

import argparse
import dataclasses
import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.cluster import slurm
from lrm_pl.errors import InputError, exit_on_error
from lrm_pl.paths import cache_folder
from lrm_pl.training.processes import launch_processes

STRATEGIES = Path("configs/trainer")
JOB_SCRIPT = Path("configs/cluster/slurm.sbatch")
PORT = 29500

#: Placeholders in printed commands for the address of the first node and for the rank of a node.
FIRST_NODE, NODE_RANK = "FIRST_NODE", "NODE_RANK"

#: Placeholder for the number of CPUs per process if Slurm is not available to determine it.
CPUS = "CPUS"


@dataclasses.dataclass(frozen=True)
class Launch:
    """A training run with one or more processes.

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
        rendezvous: Options of torchrun that configure the rendezvous of the nodes.
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


@exit_on_error
def main(words: Sequence[str]) -> None:
    """Parse the arguments of ``lrm launch``, and start the run with Slurm or torchrun."""
    split = words.index("--") if "--" in words else len(words)
    options = argument_parser().parse_args(words[:split])
    launch = plan_launch(options, words[split + 1 :])
    shows_job = options.dry_run and (options.nodes > 1 or options.partition or options.account)
    with_slurm = (slurm.available() or shows_job) and not options.master
    (launch_with_slurm if with_slurm else launch_with_torchrun)(launch, options)


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser for the options before ``--``. Arguments after ``--`` are passed to ``lrm fit``."""
    parser = argparse.ArgumentParser(
        prog="lrm launch", description=__doc__, usage="%(prog)s [options] -- [arguments of lrm fit]",
        allow_abbrev=False,
    )  # fmt: skip
    add_process_options(parser)
    add = parser.add_argument
    add(
        "--config",
        "-c",
        action="append",
        required=True,
        help="config file; later files override earlier ones",
    )
    add("--data", default="", help="folder of the shards (default: the folder in the config)")
    add("--name", default="", help="name of the run in runs/; an existing run is resumed")
    add("--strategy", default="", help=f"name of a file in {STRATEGIES} that overrides the config")
    add(
        "--time",
        default="24:00:00",
        help="time limit, after which the job is requeued (default: %(default)s)",
    )
    add("--master", default="", help="address[:port] of the first node, to start the run without Slurm")
    add("--dry-run", action="store_true", help="print the command without running it")
    return parser


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the processes of a run, which ``lrm launch`` and ``lrm doctor`` share."""
    slurm.add_options(parser)
    parser.add_argument("--processes", type=int, help="number of processes per node on CPUs (default: 1)")
    parser.add_argument("--container", default="", help="container image for pyxis")


def plan_launch(options: argparse.Namespace, arguments: Sequence[str]) -> Launch:
    """Return the run that the command line describes.

    Raises:
        InputError: An option is invalid.
    """
    gpus = options.gpus
    if gpus is None and options.master:
        raise InputError(
            "GPUS is not set, but MASTER requires GPUS",
            remedy="use GPUS=8 for eight GPUs per node, or GPUS=0 for CPUs",
        )
    if gpus is None and options.nodes == 1 and not slurm.available():
        gpus = visible_gpus()
    elif gpus is None:
        gpus = slurm.gpus_per_node(options.partition)
    slurm.check_counts(options.nodes, gpus)
    processes = processes_per_node(gpus, options.processes)
    known = sorted(path.stem for path in STRATEGIES.glob("*.yaml"))
    strategy = options.strategy or ("ddp" if options.nodes * processes > 1 else "gpu" if gpus else "cpu")
    if strategy not in known:
        raise InputError(
            expected=f"STRATEGY to be one of {known}, as defined in {STRATEGIES}/",
            found=f"{strategy!r}",
            remedy="set STRATEGY= to one of these names, and run the command in the folder that contains the Makefile",
        )
    for config in options.config:
        if not Path(config).is_file():
            raise InputError(
                expected=f"a config file at {config}", found="none", remedy="correct the path in CONFIG="
            )
    experiment = re.sub(r"[^A-Za-z0-9]+", "-", Path(options.config[0]).stem).strip("-") or "run"
    # The name includes microseconds because a shell loop may launch two runs in the same second.
    name = options.name or f"{experiment}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    if name in ("bash", "interactive"):
        raise InputError(
            f"NAME={name} is reserved by Lightning for interactive jobs", remedy="choose another name"
        )
    layers = [
        str(STRATEGIES / f"{strategy}.yaml"),
        *options.config,
    ]  # the config may override a default strategy
    if options.strategy:
        layers = [*layers[1:], layers[0]]
    return Launch(
        nodes=options.nodes,
        processes=processes,
        gpus=gpus,
        layers=tuple(layers),
        data=options.data,
        run=Path("runs") / slurm.checked("name", name),
        arguments=tuple(arguments),
    )


def data_folders(arguments: list[str]) -> list[str]:
    """Return the folders of all data sets that ``lrm fit`` reads when called with the given arguments."""
    from lrm_pl.cli.fit_config import parse_fit  # imports torch, which most launches do not need

    data = parse_fit(arguments)["data"]
    return [data["folder"], *(dataset.folder for dataset in data["also"])]


def visible_gpus() -> int:
    """Return the number of GPUs of this machine that PyTorch can use."""
    from lrm_pl.kernels.device import num_visible_gpus  # imports torch, which most launches do not need

    return num_visible_gpus()


def processes_per_node(gpus: int, processes: int | None) -> int:
    """Return the number of processes per node.

    Args:
        gpus: Number of GPUs per node. There is one process per GPU.
        processes: Number of processes per node on CPUs. If None, there is one process.

    Raises:
        InputError: ``processes`` is less than 1, or ``gpus`` is not 0 and differs from ``processes``.
    """
    count = (gpus or 1) if processes is None else processes
    if count < 1 or (gpus and count != gpus):
        raise InputError(
            expected="one process per GPU",
            found=f"PROCESSES={count} with GPUS={gpus}",
            remedy="set PROCESSES= only with GPUS=0",
        )
    return count


def launch_with_slurm(launch: Launch, options: argparse.Namespace) -> None:
    """Print the sbatch command, and run it unless ``options.dry_run`` is set."""
    here = slurm.available()
    python = "python" if options.container else sys.executable  # a container includes a Python interpreter
    command = sbatch_command(
        launch,
        [python, *launch.fit_command()],
        cpus=slurm.cpus_per_process(options.partition, launch.gpus, launch.processes) if here else CPUS,
        cache=cache_folder(),
        container=options.container,
        mounts=data_folders(launch.fit_arguments()) if options.container else (),
        partition=options.partition,
        account=options.account,
        time=options.time,
    )
    print(slurm.quoted(command), flush=True)
    if options.dry_run:
        print("DRY_RUN is set, so no job was submitted.")
        if not here:
            print(
                f"This machine has no `sbatch`, so {CPUS} is a placeholder for the number of CPUs per process. "
                "With MASTER=address, torchrun commands are printed instead."
            )
        return
    for folder in (launch.run, cache_folder()):  # required by Slurm's log file and by container mounts
        folder.mkdir(parents=True, exist_ok=True)
    job = slurm.submit(command)
    print(f"Submitted job {job}. To monitor the job:")
    print("  make tensorboard    shows curves and images")
    resume = f"run the command again with NAME={launch.run.name} to resume the run"
    print(slurm.monitoring_commands(job, launch.run, resume))


def launch_with_torchrun(launch: Launch, options: argparse.Namespace) -> None:
    """Start the processes on this machine, or print the command to run on each node.

    Raises:
        InputError: The run has several nodes, but Slurm is not available and ``options.master`` is not set, or this
            machine has too few GPUs.
    """
    if launch.nodes == 1:
        print(slurm.quoted(torchrun_command(launch, "--standalone")), flush=True)
        if options.dry_run:
            print("DRY_RUN is set, so no process was started.")
            return
        if launch.gpus > (found := visible_gpus()):
            raise InputError(
                expected=f"{launch.gpus} GPUs on this machine",
                found=f"{found} that PyTorch can use",
                remedy="run `lrm doctor`, decrease GPUS=, or train on CPUs with GPUS=0 PROCESSES=2",
            )
        launch_processes(launch.processes, ["fit", *launch.fit_arguments()])
    folder = shlex.quote(str(Path.cwd()))
    print(f"# Run this command in {folder} on each of the {launch.nodes} nodes.")
    print(f"# Replace {NODE_RANK} with the rank of the node, which is 0 on the first node.")
    print(node_command(launch, options.master))
    if not options.name:
        print(f"# Add NAME={launch.run.name} to resume this run later.")
    if not options.master:
        print(f"# Replace {FIRST_NODE} with the address of the first node, or set MASTER=address[:port].")
    sys.stdout.flush()
    if not options.master and not options.dry_run:
        raise InputError(
            expected=f"Slurm to start {launch.nodes} nodes",
            found="no `sbatch` on PATH",
            remedy=(
                "run this command on a login node, or run the printed command on each node, with the code, the data "
                "and the run folder at the same paths"
            ),
        )
