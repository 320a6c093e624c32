"""Rendering as a Slurm job: ``python -m data_tools launch`` (`make render-shards NODES=`).

It submits the job script configs/cluster/render.sbatch, which starts Ray on the nodes with ``ray symmetric-run`` and
``render`` on the first of them.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lrm_pl.cluster import slurm
from lrm_pl.errors import InputError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

JOB_SCRIPT = Path("configs/cluster/render.sbatch")


def launch(options: argparse.Namespace, out: Path) -> None:
    """Print the sbatch command, and run it unless this is a dry run.

    Args:
        options: Options of ``launch``.
        out: Folder of shards that ``options.arguments`` name.

    Raises:
        InputError: An option is invalid, or there is no Slurm.
    """
    slurm.check_counts(options.nodes, options.gpus or 0)
    if not options.dry_run and not slurm.available():
        raise InputError(
            expected="Slurm",
            found="no `sbatch` on PATH",
            remedy=(
                "run this command on a login node, or start Ray on the nodes and set RAY_ADDRESS=ip:6379 instead of "
                "NODES="
            ),
        )
    partition = slurm.effective_partition(options.partition)
    gpus = options.gpus
    if gpus is None:
        gpus = slurm.gpus_per_node(partition)
    elif slurm.available():
        slurm.node_shapes(partition)
    command = sbatch_command(
        options.nodes,
        gpus,
        out,
        options.arguments,
        partition=partition,
        account=options.account,
        time=options.time,
    )
    print(slurm.quoted(command), flush=True)
    if options.dry_run:
        print("DRY_RUN: nothing was submitted.")
        return
    out.mkdir(parents=True, exist_ok=True)
    job = slurm.submit(command)
    print(f"Submitted job {job}. {Path.cwd()}, {sys.prefix}, the assets and the shards")
    print("must have the same paths on all nodes. To monitor the job:")
    print(slurm.monitoring_commands(job, out, "run the same command again to resume"))


def sbatch_command(
    nodes: int,
    gpus: int,
    out: Path,
    arguments: Sequence[str],
    *,
    partition: str = "",
    account: str = "",
    time: str = "",
) -> list[str]:
    """Return the command that submits the rendering to Slurm.

    Args:
        nodes: Number of nodes.
        gpus: GPUs per node; 0 renders on CPUs.
        out: Folder of shards, and of the job's log.
        arguments: Arguments of ``render``.
        partition: Slurm partition; "" is Slurm's default.
        account: Slurm account; "" is Slurm's default.
        time: Time limit of one start of the job; "" is Slurm's default.

    Raises:
        InputError: The path of the folder is not plain.
    """
    options: dict[str, str | int] = {
        "job-name": f"render-{re.sub(r'[^A-Za-z0-9]+', '-', out.name).strip('-')}",
        "nodes": nodes,
        "gres": f"gpu:{gpus}" if gpus else "",  # --exclusive alone gives a step no GPUs
        "partition": partition,
        "account": account,
        "time": time,
        "output": f"{slurm.checked('out', out.as_posix())}/slurm-%j.log",
    }
    render = ["python", "-m", "data_tools", "render", *arguments]
    return slurm.sbatch_command(JOB_SCRIPT, options, [str(Path(sys.executable).parent), str(gpus), *render])


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the options; arguments of ``render`` follow after ``--``."""
    parser = commands.add_parser(
        "launch",
        help="render with a Slurm job",
        usage="python -m data_tools launch [options] -- [arguments of render]",
        description=(
            "Submit a Slurm job that starts Ray on whole nodes with `ray symmetric-run` and renders on all of them. "
            "Its log is OUT/slurm-JOB.log. After its time limit or the loss of a node, the job is requeued and "
            "continues."
        ),
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="number of nodes (default: %(default)s)")
    add("--gpus", type=int, help="GPUs per node; 0 renders on CPUs (default: as reported by Slurm)")
    add("--partition", default="", help="Slurm partition")
    add("--account", default="", help="Slurm account")
    add("--time", default="", help="time limit of one start of the job (default: Slurm's)")
    add("--dry-run", action="store_true", help="print the command without running it")
    add("arguments", nargs="*", help=argparse.SUPPRESS)
