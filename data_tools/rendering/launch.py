"""``python -m data_tools launch``: render on the nodes of a Slurm job (`make render-shards NODES=`).

It fills configs/cluster/render.sbatch, shows it and submits it. The job starts Ray on its nodes with Ray's own
launcher, ``ray symmetric-run``, and ``render`` on the first of them.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrm_pl.cluster import slurm
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

TEMPLATE = Path("configs/cluster/render.sbatch")


def launch(options: argparse.Namespace, out: Path) -> None:
    """Show the job's script, and submit it unless the run is dry.

    Args:
        options: Of ``launch``.
        out: Folder of shards that ``options.arguments`` name.

    Raises:
        InputError: Something that cannot be used, or no Slurm.
    """
    for name, value, least in (("NODES", options.nodes, 1), ("GPUS", options.gpus or 0, 0)):
        if value < least:
            raise InputError(expected=f"{name} of at least {least}", found=value, remedy=f"correct {name}=")
    if not options.dry_run and not slurm.available():
        raise InputError(
            expected="Slurm to start the nodes",
            found="no `sbatch` on PATH",
            remedy=(
                "run this on a login node, or start Ray on the nodes yourself and give its address "
                "without NODES=: RAY_ADDRESS=ip:6379"
            ),
        )
    gpus = options.gpus
    partition = slurm.chosen_partition(options.partition)
    if gpus is None:
        gpus = slurm.gpus_a_node(partition)
    elif slurm.available():
        slurm.node_shapes(partition)
    script = job_script(
        options.nodes,
        gpus,
        out,
        options.arguments,
        partition=partition,
        account=options.account,
        time=options.time,
    )
    print(script)
    path = out / "job.sbatch"
    if options.dry_run:
        print(f"DRY_RUN: nothing was submitted; the script would be {path}.")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, script.encode())
    job = slurm.submit(path)
    print(f"Submitted job {job}, script {path}. All nodes must see {Path.cwd()}, {sys.prefix},")
    print("the assets and the shards at these same paths. To follow it:")
    print(f"  tail -F {out}/slurm-{job}.log    what it prints, from its start on")
    print(f"  squeue -j {job}    where it is in the queue")
    print(f"  scancel {job}    ends it; the same command goes on from there")


def job_script(
    nodes: int,
    gpus: int,
    out: Path,
    arguments: Sequence[str],
    *,
    partition: str = "",
    account: str = "",
    time: str = "",
) -> str:
    """Fill the template of the job.

    Args:
        nodes: Machines.
        gpus: GPUs a machine; 0 renders on CPUs.
        out: Folder of shards; the job's log goes there.
        arguments: Arguments of ``render``.
        partition: Slurm's partition; "" leaves it to Slurm.
        account: Who pays; "" leaves it to Slurm.
        time: Limit of one start of the job; "" leaves it to Slurm.

    Raises:
        InputError: A value that would add to the script, or no template.
    """
    values = {
        "name": f"render-{re.sub(r'[^A-Za-z0-9]+', '-', out.name).strip('-')}",
        "nodes": str(nodes),
        "gres": f"gpu:{gpus}" if gpus else "",  # a step gets no GPU that --exclusive alone has brought
        "gpus": str(gpus),
        "partition": slurm.checked("partition", partition),
        "account": slurm.checked("account", account),
        "time": slurm.checked("time", time),
        "out": slurm.checked("out", out.as_posix()),
        "bin": slurm.quoted([str(Path(sys.executable).parent)]),
        "command": slurm.quoted(["python", "-m", "data_tools", "render", *arguments]),
    }
    return slurm.fill(slurm.read_template(TEMPLATE), values, TEMPLATE)


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Describe the command line; ``render``'s arguments come after ``--``."""
    parser = commands.add_parser(
        "launch",
        help="render on the nodes of a Slurm job",
        usage="python -m data_tools launch [options] -- [arguments of render]",
        description=(
            "Submit a Slurm job that starts Ray on whole nodes with `ray symmetric-run` and renders on all of them; "
            "its log is OUT/slurm-JOB.log. A job whose time is up, or that lost a node, comes back and goes on."
        ),
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="machines")
    add("--gpus", type=int, help="GPUs a machine; 0 renders on CPUs; Slurm is asked if it is not given")
    add("--partition", default="", help="Slurm's partition")
    add("--account", default="", help="Slurm's account")
    add("--time", default="", help="limit of one start of the job; Slurm's own if it is not given")
    add("--dry-run", action="store_true", help="only show")
    add("arguments", nargs="*", help=argparse.SUPPRESS)
