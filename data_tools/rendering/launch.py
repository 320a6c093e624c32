"""The command ``python -m data_tools launch`` (``make render-shards NODES=``), which renders meshes in a Slurm job.

The job script ``configs/cluster/render.sbatch`` starts Ray on all nodes with ``ray symmetric-run``, and runs ``render``
on the first node.
"""

import argparse
import re
import sys
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
        out: Folder of shards, as specified in ``options.arguments``.

    Raises:
        InputError: An option is invalid, or Slurm is not available.
    """
    slurm.check_counts(options.nodes, options.gpus or 0)
    if not options.dry_run and not slurm.available():
        raise InputError(
            expected="Slurm",
            found="no `sbatch` on PATH",
            remedy="use a login node, or start Ray on the nodes and set RAY_ADDRESS=ip:6379",
        )
    if options.gpus is None:
        options.gpus = slurm.gpus_per_node(options.partition)
    elif slurm.available():
        slurm.node_shapes(options.partition)  # checks that the partition exists
    command = sbatch_command(options, out)
    print(slurm.quoted(command), flush=True)
    if options.dry_run:
        print("DRY_RUN is set, so no job was submitted.")
        return
    out.mkdir(parents=True, exist_ok=True)
    job = slurm.submit(command)
    print(f"Submitted job {job}. To monitor the job:")
    print(slurm.monitoring_commands(job, out, "run the same command again to resume"))
    print(f"{Path.cwd()}, {sys.prefix}, the assets and the shards must have the same paths on all nodes.")


def sbatch_command(options: argparse.Namespace, out: Path) -> list[str]:
    """Return the sbatch command that submits the render job.

    Args:
        options: Arguments of the command. ``gpus`` is the number of GPUs per node, or 0 to render on CPUs. If
            ``partition``, ``account`` or ``time`` is "", Slurm's default is used.
        out: Folder of shards, to which the log of the job is also written.

    Raises:
        InputError: The path of the folder contains characters that Slurm does not accept.
    """
    words: dict[str, str | int] = {
        "job-name": f"render-{re.sub(r'[^A-Za-z0-9]+', '-', out.name).strip('-')}",
        "nodes": options.nodes,
        "gres": f"gpu:{options.gpus}" if options.gpus else "",  # --exclusive does not assign GPUs to a step
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "output": f"{slurm.checked('out', out.as_posix())}/slurm-%j.log",
    }
    environment = str(Path(sys.executable).parent)
    render = ["python", "-m", "data_tools", "render", *options.arguments]
    return slurm.sbatch_command(JOB_SCRIPT, words, [environment, str(options.gpus), *render])


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``launch`` subcommand. The arguments of ``render`` are given after ``--``."""
    parser = commands.add_parser(
        "launch",
        help="render with a Slurm job",
        usage="python -m data_tools launch [options] -- [arguments of render]",
        description=(
            "Submit a Slurm job that starts Ray on whole nodes with `ray symmetric-run` and renders on all of them. "
            "The log is OUT/slurm-JOB.log. If the time limit is reached or a node fails, the job is requeued and "
            "resumes."
        ),
    )
    slurm.add_options(parser)
    add = parser.add_argument
    add(
        "--time",
        default="",
        help="time limit of the job, after which it is requeued (default: Slurm's default)",
    )
    add("--dry-run", action="store_true", help="print the command without running it")
    add("arguments", nargs="*", help=argparse.SUPPRESS)
