"""Rendering as a Slurm job: ``python -m data_tools launch`` (`make render-shards NODES=`).

The job script is made from configs/cluster/render.sbatch. It starts Ray on all nodes with ``ray symmetric-run``, and
``render`` on the first one.
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
    """Print the job script, and submit it unless ``options.dry_run`` is set.

    Args:
        options: Parsed options of ``launch``.
        out: Folder of shards in ``options.arguments``.

    Raises:
        InputError: An option is invalid, or Slurm is not available.
    """
    for name, value, least in (("NODES", options.nodes, 1), ("GPUS", options.gpus or 0, 0)):
        if value < least:
            raise InputError(expected=f"{name} of at least {least}", found=value, remedy=f"correct {name}=")
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
        print(f"Dry run: not submitted. The script would be written to {path}.")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, script.encode())
    job = slurm.submit(path)
    print(f"Submitted job {job} with script {path}. {Path.cwd()}, {sys.prefix}, the assets and the shards")
    print("must have the same paths on all nodes. To monitor the job:")
    print(f"  tail -F {out}/slurm-{job}.log    output of the job")
    print(f"  squeue -j {job}    state of the job")
    print(f"  scancel {job}    cancel it; run the same command again to resume")


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
    """Create the job script from its template.

    Args:
        nodes: Number of nodes.
        gpus: GPUs per node; 0 renders on CPUs.
        out: Folder of shards, which also receives the job's log.
        arguments: Arguments of ``render``.
        partition: Slurm partition; "" for the default.
        account: Slurm account; "" for the default.
        time: Time limit of the job; "" for the partition's default.

    Raises:
        InputError: A value cannot be used in a job script, or the template is missing.
    """
    values = {
        "name": f"render-{re.sub(r'[^A-Za-z0-9]+', '-', out.name).strip('-')}",
        "nodes": str(nodes),
        "gres": f"gpu:{gpus}" if gpus else "",  # required: --exclusive alone does not give GPUs to job steps
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
    """Add the parser of ``launch``, whose positional arguments are those of ``render``."""
    parser = commands.add_parser(
        "launch",
        help="render with a Slurm job",
        usage="python -m data_tools launch [options] -- [arguments of render]",
        description=(
            "Submit a Slurm job that starts Ray with `ray symmetric-run` and renders on all of its nodes. The log is "
            "OUT/slurm-JOB.log. The job is requeued when its time limit is reached or a node fails, and resumes."
        ),
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="number of nodes (default: %(default)s)")
    add("--gpus", type=int, help="GPUs per node; 0 renders on CPUs (default: as reported by Slurm)")
    add("--partition", default="", help="Slurm partition")
    add("--account", default="", help="Slurm account")
    add("--time", default="", help="time limit of the job (default: that of the partition)")
    add("--dry-run", action="store_true", help="print the job script without submitting it")
    add("arguments", nargs="*", help=argparse.SUPPRESS)
