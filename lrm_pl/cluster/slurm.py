"""Interface to Slurm for job submission, queries of a partition's nodes, and container options of srun (pyxis)."""

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrm_pl.errors import InputError

#: Maps the name of each field to a pattern for valid values and an example.
PATTERNS = {
    "name": (r"[A-Za-z0-9][A-Za-z0-9._-]*", "demo-1"),
    "master": (r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?", "node-1.cluster:29500"),
    "out": (r"[A-Za-z0-9_./][A-Za-z0-9_./+=@-]*", "data/mine"),
}


@dataclasses.dataclass(frozen=True)
class NodeShape:
    """Numbers of CPUs and GPUs of a node."""

    cpus: int
    gpus: int


def available() -> bool:
    """Return whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def checked(field: str, value: str) -> str:
    """Return a value after checking it against the pattern of its field. An empty value is always valid.

    Args:
        field: Name of a field in ``PATTERNS``.
        value: Value to check.

    Raises:
        InputError: The value does not match the pattern of the field.
    """
    pattern, example = PATTERNS[field]
    if value and not re.fullmatch(pattern, value):
        raise InputError(
            expected=f"a value like {example!r} for {field.upper()}",
            found=f"{value!r}",
            remedy="use only letters, digits and the punctuation marks of the example",
        )
    return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the nodes of a job."""
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="number of nodes (default: 1)")
    add("--gpus", type=int, help="number of GPUs per node, or 0 for CPUs (default: as reported by Slurm)")
    partition = os.environ.get("SBATCH_PARTITION", "")
    add(
        "--partition",
        default=partition,
        help="Slurm partition (default: environment variable SBATCH_PARTITION)",
    )
    add("--account", default="", help="Slurm account (default: the account that Slurm selects)")


def quoted(words: Sequence[str]) -> str:
    """Quote words and join them into a shell command.

    Raises:
        InputError: A word contains control characters, such as a line break.
    """
    for word in words:
        if not word.isprintable():
            raise InputError(
                expected="printable arguments", found=f"{word!r}", remedy="set this value in a config file"
            )
    return shlex.join(words)


def sbatch_command(script: Path, options: Mapping[str, str | int], arguments: Sequence[str]) -> list[str]:
    """Return the command that submits a job script.

    Args:
        script: Path of the job script.
        options: Values of long options of sbatch, by name. Options with an empty value are omitted. The other options
            override the ``#SBATCH`` lines of the script.
        arguments: Arguments of the script.
    """
    given = [f"--{name}={value}" for name, value in options.items() if value]
    return ["sbatch", "--parsable", *given, str(script), *arguments]


def check_counts(nodes: int, gpus: int) -> None:
    """Check the number of nodes and the number of GPUs per node.

    Raises:
        InputError: ``nodes`` is less than 1, or ``gpus`` is less than 0.
    """
    for name, value, minimum in (("NODES", nodes, 1), ("GPUS", gpus, 0)):
        if value < minimum:
            raise InputError(expected=f"{name} of at least {minimum}", found=value)


def monitoring_commands(job: str, folder: Path, resume: str) -> str:
    """Return the shell commands that monitor and cancel a job.

    Args:
        job: ID of the job.
        folder: Folder of the job's log file.
        resume: Note on how to resume the job.
    """
    return (
        f"  tail -F {folder}/slurm-{job}.log    prints the output of the job\n"
        f"  squeue -j {job}    prints the state of the job\n"
        f"  scancel {job}    cancels the job; {resume}"
    )


def submit(command: Sequence[str]) -> str:
    """Run a command that ``sbatch_command`` returned, and return the ID of the job.

    Raises:
        InputError: Slurm rejected the job.
    """
    return _run(*command).strip().split(";")[0]


def node_shapes(partition: str) -> list[NodeShape]:
    """Return the numbers of CPUs and GPUs of the nodes of a partition.

    Args:
        partition: Name of the partition, or names separated by commas. If "", the default partition is used.

    Raises:
        InputError: Slurm does not respond, or the partition does not exist.
    """
    rows = _run("sinfo", "--all", "--noheader", "--Node", "--format=%P|%c|%N|%G").splitlines()
    entries = [row.strip().split("|", 3) for row in rows]
    names, usable = partition.split(","), _usable_cpus()
    shapes = [
        NodeShape(usable.get(node, int(cpus)), sum(map(int, re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))))
        for name, cpus, node, gres in entries
        if (name.removesuffix("*") in names if partition else name.endswith("*"))
    ]
    if not shapes:
        raise InputError(
            expected=f"the partition {partition}" if partition else "a default partition",
            found=f"only the partitions {sorted({name for name, *_ in entries})}",
            remedy="set PARTITION= to one of them",
        )
    return shapes


def _usable_cpus() -> dict[str, int]:
    """Return a mapping from node name to the number of CPUs that jobs can use.

    `sinfo` also counts CPUs that CoreSpecCount reserves for the system. The result is empty for versions of Slurm
    before 22.05, which do not report the number of usable CPUs.
    """
    if shutil.which("scontrol") is None:
        return {}
    nodes = _run("scontrol", "--oneliner", "show", "node").splitlines()
    found = (re.search(r"NodeName=(\S+) .*\bCPUEfctv=(\d+)", node) for node in nodes)
    return {match[1]: int(match[2]) for match in found if match}


def gpus_per_node(partition: str) -> int:
    """Return the number of GPUs per node of a partition.

    Raises:
        InputError: Slurm is not available, or the nodes have different numbers of GPUs.
    """
    if not available():
        raise InputError("GPUS is not set", remedy="use GPUS=8 for eight GPUs per node, or GPUS=0 for CPUs")
    counts = sorted({shape.gpus for shape in node_shapes(partition)})
    if len(counts) > 1:
        raise InputError(
            f"GPUS is not set, and the nodes have different numbers of GPUs: {counts}",
            remedy="set GPUS= to the number of GPUs per node",
        )
    print(f"GPUS is not set. The job uses all {counts[0]} GPUs of each node.")
    return counts[0]


def cpus_per_process(partition: str, gpus: int, processes: int) -> int:
    """Return the number of CPUs to request for each process. Slurm's default of one CPU is too low.

    The result is the number of CPUs of a node divided by the number of GPUs of the node, including GPUs that the job
    does not use. If the node has no GPUs, the divisor is the number of processes.

    Args:
        partition: Slurm partition. If "", the default partition is used.
        gpus: Number of GPUs per node that the job uses.
        processes: Number of processes per node.

    Raises:
        InputError: A node has fewer CPUs than processes, so the job would never start.
    """
    shapes = node_shapes(partition)
    cpus = min(shape.cpus // (max(shape.gpus, gpus) or processes) for shape in shapes)
    if cpus < 1:
        raise InputError(
            expected=f"at most {min(shape.cpus for shape in shapes)} processes per node, one per CPU",
            found=processes,
            remedy="decrease PROCESSES= or GPUS=",
        )
    return cpus


def container_options(image: str, folders: Sequence[str | Path]) -> list[str]:
    """Return the options of srun (pyxis) that run a step in a container.

    Args:
        image: Image name for enroot, or path of a .sqsh file. If "", no container is used.
        folders: Folders to mount at the same path in the container, in addition to the working folder. URLs are
            ignored.

    Raises:
        InputError: The path of a folder contains a comma or a colon, which mount options do not support.
    """
    if not image:
        return []
    here = Path.cwd()
    mounts = [here]
    local = (Path(folder) for folder in folders if "://" not in str(folder))
    for folder in dict.fromkeys(path.resolve() for path in local):
        if not any(folder.is_relative_to(mount) for mount in mounts):
            mounts.append(folder)
    if bad := [str(mount) for mount in mounts if re.search(r"[,:]", str(mount))]:
        raise InputError(
            expected="paths without commas or colons to mount in the container",
            found=bad,
            remedy="rename them",
        )
    return [
        f"--container-image={image}",
        f"--container-mounts={','.join(f'{mount}:{mount}' for mount in mounts)}",
        f"--container-workdir={here}",
    ]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"`{command[0]}` failed with status {done.returncode}: {done.stderr.strip() or 'no message'}",
            remedy=(
                "fix this problem, or run without Slurm: MASTER=localhost with GPUS= trains on this machine, and `make "
                "render-shards` without NODES= renders on this machine"
            ),
        )
    return done.stdout
