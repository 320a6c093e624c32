"""The command ``python -m data_tools launch`` (``make render-shards NODES=``), which renders in a Slurm job.

The job script ``configs/cluster/render.sbatch`` starts Ray on all nodes with ``ray symmetric-run``, and runs ``render``
on the first node.
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
    """Print the sbatch command, and run it if ``options.dry_run`` is False.

    Args:
        options: Parsed arguments of the command.
        out: Folder of shards, which is an option in ``options.arguments``.

    Raises:
        InputError: An option is invalid, or Slurm is not available.
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
    gpus = options.gpus
    if gpus is None:
        gpus = slurm.gpus_per_node(options.partition)
    elif slurm.available():
        slurm.node_shapes(options.partition)
    command = sbatch_command(
        options.nodes,
        gpus,
        out,
        options.arguments,
        partition=options.partition,
        account=options.account,
        time=options.time,
    )
    print(slurm.quoted(command), flush=True)
    if options.dry_run:
        print("DRY_RUN is set, so no job was submitted.")
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
        gpus: Number of GPUs per node. If 0, the CPUs are used.
        out: Folder of shards, to which the log of the job is also written.
        arguments: Arguments of ``render``.
        partition: Slurm partition. If "", the default of Slurm is used.
        account: Slurm account. If "", the default of Slurm is used.
        time: Time limit of one start of the job, in the format of Slurm. If "", the default of Slurm is used.

    Raises:
        InputError: The path of the folder contains characters that Slurm does not accept.
    """
    options: dict[str, str | int] = {
        "job-name": f"render-{re.sub(r'[^A-Za-z0-9]+', '-', out.name).strip('-')}",
        "nodes": nodes,
        "gres": f"gpu:{gpus}" if gpus else "",  # --exclusive does not assign GPUs to a step
        "partition": partition,
        "account": account,
        "time": time,
        "output": f"{slurm.checked('out', out.as_posix())}/slurm-%j.log",
    }
    render = ["python", "-m", "data_tools", "render", *arguments]
    return slurm.sbatch_command(JOB_SCRIPT, options, [str(Path(sys.executable).parent), str(gpus), *render])


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``launch`` subcommand. The arguments of ``render`` follow after ``--``."""
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
    slurm.add_options(parser)
    add = parser.add_argument
    add("--time", default="", help="time limit of one start of the job (default: Slurm's)")
    add("--dry-run", action="store_true", help="print the command without running it")
    add("arguments", nargs="*", help=argparse.SUPPRESS)
