"""``lrm launch``: start `lrm fit` on several processes, under Slurm or with torchrun (`make train NODES= GPUS=`).

Under Slurm it fills configs/cluster/slurm.sbatch, shows it and submits it. Elsewhere it starts one node's processes
itself; for more nodes it prints the line that starts each of them.
"""

import argparse
import datetime
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.cluster import slurm
from lrm_pl.cluster.job import FIRST_NODE, NODE_RANK, STRATEGIES, Launch, job_script, node_line, torchrun
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.training.processes import launch_processes
from lrm_pl.weights.resolve import cache_folder

#: Stands for a process's CPUs in a script that is shown where there is no Slurm to ask.
CPUS = "CPUS"


def planned(options: argparse.Namespace, arguments: Sequence[str]) -> Launch:
    """Turn the command line into a run.

    Raises:
        InputError: Something that cannot be used.
    """
    if options.gpus is None and options.master:
        raise InputError(
            expected="GPUS with MASTER",
            found="none",
            remedy="GPUS=8 is eight GPUs a node, GPUS=0 trains on CPUs",
        )
    if slurm.available() and not options.master:
        options.partition = slurm.chosen_partition(options.partition)
    gpus = options.gpus
    if gpus is None and options.nodes == 1 and not slurm.available():
        gpus = gpus_here()
    elif gpus is None:
        gpus = slurm.gpus_a_node(options.partition)
    for name, value, least in (("NODES", options.nodes, 1), ("GPUS", gpus, 0)):
        if value < least:
            raise InputError(expected=f"{name} of at least {least}", found=value, remedy=f"correct {name}=")
    processes = processes_a_node(gpus, options.processes)
    fitting = "ddp" if options.nodes * processes > 1 else "gpu" if gpus else "cpu"
    for strategy in (fitting, slurm.checked("strategy", options.strategy)):
        if strategy and not (STRATEGIES / f"{strategy}.yaml").is_file():
            known = sorted(path.stem for path in STRATEGIES.glob("*.yaml"))
            raise InputError(
                expected=f"STRATEGY among {known} ({STRATEGIES}/)",
                found=f"{strategy!r}",
                remedy="name one of them",
            )
    for config in options.config:
        if not Path(config).is_file():
            raise InputError(expected="a config file", found=f"none at {config}", remedy="correct CONFIG=")
    experiment = re.sub(r"[^A-Za-z0-9]+", "-", Path(options.config[0]).stem).strip("-") or "run"
    # To the microsecond: runs of one name are one run, and a loop of the shell launches two within a second.
    name = options.name or f"{experiment}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    if name in ("bash", "interactive"):
        raise InputError(
            expected="another NAME",
            found=f"{name!r}: Lightning takes it for a shell, not a job",
            remedy="choose one",
        )
    run = Path("runs") / slurm.checked("name", name)
    below = "" if options.strategy else fitting
    return Launch(
        nodes=options.nodes,
        processes=processes,
        gpus=gpus,
        below=below,
        configs=tuple(options.config),
        strategy=options.strategy,
        data=options.data,
        run=run,
        arguments=tuple(arguments),
    )


def data_folders(arguments: list[str]) -> list[str]:
    """Return the folders of all data sets that `lrm fit` with these arguments reads."""
    from lrm_pl.cli.fit_config import parse_fit  # loads torch, which most launches can do without

    data = parse_fit(arguments)["data"]
    return [data["folder"], *(one.folder for one in data["also"])]


def gpus_here() -> int:
    """Return how many GPUs of this machine PyTorch can use."""
    from lrm_pl.kernels.device import num_visible_gpus  # loads torch, which other launches can do without

    return num_visible_gpus()


def processes_a_node(gpus: int, given: int | None) -> int:
    """Return the processes that a node runs: one a GPU, or on CPUs as many as are given.

    Raises:
        InputError: The two do not fit.
    """
    processes = (gpus or 1) if given is None else given
    if processes < 1 or (gpus and processes != gpus):
        raise InputError(
            expected="one process a GPU",
            found=f"PROCESSES={processes} with GPUS={gpus}",
            remedy="PROCESSES= is for CPUs: GPUS=0",
        )
    return processes


def launch_with_slurm(launch: Launch, options: argparse.Namespace) -> None:
    """Show the job's script, and submit it unless the run is dry."""
    here = slurm.available()
    cpus = slurm.cpus_a_process(options.partition, launch.gpus, launch.processes) if here else CPUS
    python = "python" if options.container else sys.executable  # an image has its own
    script = job_script(
        launch,
        [python, *launch.fit()],
        cpus=cpus,
        cache=cache_folder(),
        partition=options.partition,
        account=options.account,
        time=options.time,
        container=options.container,
        mounts=data_folders(launch.fit_arguments()) if options.container else (),
    )
    print(script)
    path = launch.run / "job.sbatch"
    if options.dry_run:
        print(f"DRY_RUN: nothing was submitted; the script would be {path}.")
        if not here:
            print(
                f"There is no `sbatch` here: {CPUS} stands for a process's share of a node's CPUs, which Slurm tells. "
                "MASTER=address shows the lines of torchrun instead."
            )
        return
    for folder in (launch.run, cache_folder()):  # a container mounts only what is there
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, script.encode())
    job = slurm.submit(path)
    print(f"Submitted job {job}, script {path}. To follow it:")
    print(f"  tail -F {launch.run}/slurm-{job}.log    what it prints, from its start on")
    print(f"  squeue -j {job}    where it is in the queue")
    print("  make tensorboard    its curves and images")
    print(f"  scancel {job}    ends it; the same command with NAME={launch.run.name} goes on from there")


def launch_with_torchrun(launch: Launch, options: argparse.Namespace) -> None:
    """Start this machine's processes, or show what to type on each machine.

    Raises:
        InputError: More nodes than this machine, and nothing that could start them; or fewer GPUs than asked for.
    """
    if launch.nodes == 1:
        print(slurm.quoted(torchrun(launch, "--standalone")), flush=True)
        if options.dry_run:
            print("DRY_RUN: nothing was started.")
            return
        if launch.gpus > (found := gpus_here()):
            raise InputError(
                expected=f"{launch.gpus} GPUs on this machine",
                found=f"{found} that PyTorch can use",
                remedy="see `lrm doctor`, give fewer (GPUS=), or train on CPUs: GPUS=0 PROCESSES=2",
            )
        launch_processes(launch.processes, ["fit", *launch.fit_arguments()])
    where = shlex.quote(str(Path.cwd()))
    print(f"# on each of the {launch.nodes} nodes, in {where}; {NODE_RANK} is 0 on the first, then 1, 2 ...")
    print(node_line(launch, options.master))
    if not options.name:
        print(f"# To go on with this run later, say NAME={launch.run.name} too.")
    if not options.master:
        print(
            f"# {FIRST_NODE} stands for the address of node 0, as the other nodes reach it: MASTER=address[:port]"
        )
    sys.stdout.flush()
    if not options.master and not options.dry_run:
        raise InputError(
            expected=f"Slurm to start {launch.nodes} nodes",
            found="no `sbatch` on PATH",
            remedy=(
                "nothing was started: run this on a login node, or type the line above on each node, "
                "with code, data and run folder at the same paths"
            ),
        )


def argument_parser() -> argparse.ArgumentParser:
    """Describe the command line; `lrm fit`'s arguments come after ``--``."""
    parser = argparse.ArgumentParser(
        prog="lrm launch", description=__doc__, usage="%(prog)s [options] -- [arguments of lrm fit]",
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="machines")
    add("--gpus", type=int, help="GPUs a machine; 0 trains on CPUs; Slurm is asked if it is not given")
    add("--processes", type=int, help="processes a machine where no GPU is used (1)")
    add("--config", "-c", action="append", required=True, help="a layer of the config; the last wins")
    add("--data", default="", help="folder of the shards; the config's unless given")
    add("--name", default="", help="the run is runs/NAME; one that is there is gone on with")
    add(
        "--strategy",
        default="",
        help=f"a layer of {STRATEGIES} (ddp for more than one process, unless the config says otherwise)",
    )
    add("--partition", default="", help="Slurm's partition")
    add("--account", default="", help="Slurm's account")
    add("--time", default="24:00:00", help="limit of one start of the job (24:00:00)")
    add("--container", default="", help="image that the processes run in (pyxis)")
    add(
        "--master",
        default="",
        help="address[:port] of the first machine; Slurm is not asked, if there is one",
    )
    add("--dry-run", action="store_true", help="only show")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command line; expected errors end in one message instead of a traceback."""
    words = sys.argv[2:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    options = argument_parser().parse_args(words[:split])
    try:
        launch = planned(options, words[split + 1 :])
        asked = options.dry_run and (options.nodes > 1 or options.partition or options.account)
        with_slurm = (slurm.available() or asked) and not options.master
        (launch_with_slurm if with_slurm else launch_with_torchrun)(launch, options)
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
