"""Slurm: job submission, the nodes of a partition, and container options of srun (pyxis)."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrm_pl.errors import InputError

#: Field -> pattern of its values, and an example.
PATTERNS = {
    "name": (r"[A-Za-z0-9][A-Za-z0-9._-]*", "demo-1"),
    "master": (r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?", "node-1.cluster:29500"),
    "out": (r"[A-Za-z0-9_./][A-Za-z0-9_./+=@-]*", "data/mine"),
}


@dataclasses.dataclass(frozen=True)
class NodeShape:
    """CPUs and GPUs of a node."""

    cpus: int
    gpus: int


def available() -> bool:
    """Return whether jobs can be submitted from this machine."""
    return shutil.which("sbatch") is not None


def checked(field: str, value: str) -> str:
    """Return the value of a field of ``PATTERNS``, or an empty string.

    Raises:
        InputError: The value does not match the field's pattern.
    """
    pattern, example = PATTERNS[field]
    if value and not re.fullmatch(pattern, value):
        raise InputError(
            expected=f"{field.upper()} to look like {example!r}",
            found=f"{value!r}",
            remedy="use only letters, digits and the punctuation of the example",
        )
    return value


def effective_partition(partition: str) -> str:
    """Return the partition that sbatch uses: the given one, else SBATCH_PARTITION; "" is Slurm's default."""
    return partition or os.environ.get("SBATCH_PARTITION", "")


def quoted(words: Sequence[str]) -> str:
    """Join words to a shell command.

    Raises:
        InputError: A word has control characters, such as a line break.
    """
    for word in words:
        if not word.isprintable():
            raise InputError(
                expected="printable arguments", found=f"{word!r}", remedy="put such values into a config file"
            )
    return shlex.join(words)


def sbatch_command(script: Path, options: Mapping[str, str | int], arguments: Sequence[str]) -> list[str]:
    """Return the command that submits a job script; options without a value are left out.

    Args:
        script: The job script. The options override its ``#SBATCH`` lines.
        options: Long options of sbatch.
        arguments: Arguments of the script.
    """
    given = [f"--{name}={value}" for name, value in options.items() if value]
    return ["sbatch", "--parsable", *given, str(script), *arguments]


def check_counts(nodes: int, gpus: int) -> None:
    """Check the number of nodes and of GPUs per node.

    Raises:
        InputError: A number is too small.
    """
    for name, value, minimum in (("NODES", nodes, 1), ("GPUS", gpus, 0)):
        if value < minimum:
            raise InputError(expected=f"{name} of at least {minimum}", found=value, remedy=f"correct {name}=")


def monitoring_commands(job: str, folder: Path, resume: str) -> str:
    """Return the commands to monitor and cancel a job with its log in ``folder``. ``resume`` is a note on resuming."""
    return (
        f"  tail -F {folder}/slurm-{job}.log    output of the job\n"
        f"  squeue -j {job}    state of the job\n"
        f"  scancel {job}    cancel it; {resume}"
    )


def submit(command: Sequence[str]) -> str:
    """Run a command of ``sbatch_command`` and return the job's id.

    Raises:
        InputError: Slurm rejects the job.
    """
    return _run(*command).strip().split(";")[0]


def node_shapes(partition: str) -> list[NodeShape]:
    """Return the shapes of the nodes of a partition; "" is the default partition.

    Raises:
        InputError: Slurm does not respond, or has no such partition.
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
            expected=f"a partition {partition}" if partition else "a default partition",
            found=f"the partitions {sorted({name for name, *_ in entries})}",
            remedy="set PARTITION= to one of them",
        )
    return shapes


def _usable_cpus() -> dict[str, int]:
    """Return the CPUs per node that jobs can use: `sinfo` includes those reserved for the system by CoreSpecCount.

    Empty before Slurm 22.05, which does not report them.
    """
    if shutil.which("scontrol") is None:
        return {}
    nodes = _run("scontrol", "--oneliner", "show", "node").splitlines()
    found = (re.search(r"NodeName=(\S+) .*\bCPUEfctv=(\d+)", node) for node in nodes)
    return {match[1]: int(match[2]) for match in found if match}


def gpus_per_node(partition: str) -> int:
    """Return the number of GPUs of the nodes of a partition.

    Raises:
        InputError: There is no Slurm, or the nodes have different numbers of GPUs.
    """
    if not available():
        raise InputError("GPUS is not set", remedy="use GPUS=8 for eight GPUs per node, or GPUS=0 for CPUs")
    counts = sorted({shape.gpus for shape in node_shapes(partition)})
    if len(counts) > 1:
        raise InputError(
            f"GPUS is not set, and the nodes have different numbers of GPUs: {counts}",
            remedy="set GPUS= to the number per node",
        )
    print(f"GPUS is not set: using the {counts[0]} GPUs of the nodes of this partition.")
    return counts[0]


def cpus_per_process(partition: str, gpus: int, processes: int) -> int:
    """Return the CPUs for each process: those of a node over its GPUs, also of GPUs that the job does not use.

    Slurm's default of one CPU is too few for the data loader.

    Raises:
        InputError: There are more processes than CPUs; the job would never start.
    """
    shapes = node_shapes(partition)
    cpus = min(shape.cpus // (max(shape.gpus, gpus) or processes) for shape in shapes)
    if cpus < 1:
        raise InputError(
            expected=f"at most {min(shape.cpus for shape in shapes)} processes per node, one per CPU",
            found=processes,
            remedy="lower PROCESSES= or GPUS=",
        )
    return cpus


def container_options(image: str, folders: Sequence[str | Path]) -> list[str]:
    """Return options of srun (pyxis) that run a step in a container.

    Args:
        image: Image name for enroot, or a .sqsh file; "" is no container.
        folders: Folders to mount at the same path in addition to the working folder; URLs are ignored.

    Raises:
        InputError: A path has a comma or a colon, which mounts cannot express.
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
            expected="paths without commas and colons to mount in the container",
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
                "correct the cause, or work without Slurm: MASTER=localhost with GPUS= trains on this machine, and "
                "`make render-shards` without NODES= renders on it"
            ),
        )
    return done.stdout
