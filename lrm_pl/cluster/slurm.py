"""What this project asks of Slurm: a job script from the template, its submission, the shape of a partition's nodes.

The template is a plain shell script with ``string.Template`` placeholders. Values that end in ``#SBATCH`` lines, where
nothing can be quoted, are checked against patterns; those that end in the shell's part are quoted.
"""

import dataclasses
import os
import re
import shlex
import shutil
import string
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from lrm_pl.errors import InputError

TEMPLATE = Path("configs/cluster/slurm.sbatch")

#: What a value in an ``#SBATCH`` line may look like, and an example for the message.
PATTERNS = {
    "name": (r"[A-Za-z0-9][A-Za-z0-9._-]*", "demo-1"),
    "partition": (r"[A-Za-z0-9_][A-Za-z0-9._,-]*", "gpu"),
    "account": (r"[A-Za-z0-9_][A-Za-z0-9._@-]*", "my-project"),
    "time": (r"(\d+-)?\d+(:\d+){0,2}", "24:00:00"),
    "master": (r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d+)?", "node-1.cluster:29500"),
    "strategy": (r"[A-Za-z0-9_-]+", "ddp"),
    "out": (r"[A-Za-z0-9_./][A-Za-z0-9_./+=@-]*", "data/mine"),
}


@dataclasses.dataclass(frozen=True)
class NodeShape:
    """What one node of a partition offers."""

    cpus: int
    gpus: int


def available() -> bool:
    """Return whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None


def checked(field: str, value: str) -> str:
    """Return a value that is safe where it is not quoted; "" stands for one that was not given.

    Raises:
        InputError: It holds anything but what such a value is made of.
    """
    pattern, example = PATTERNS[field]
    if value and not re.fullmatch(pattern, value):
        raise InputError(
            expected=f"{field.upper()} to look like {example!r}",
            found=f"{value!r}",
            remedy=(
                "it goes into a script as it is, so give only letters, digits and the signs of the example"
            ),
        )
    return value


def chosen_partition(typed: str) -> str:
    """Return the partition that sbatch will use, "" for the default: SBATCH_PARTITION overrides the script.

    Raises:
        InputError: The variable and the command line differ.
    """
    own = os.environ.get("SBATCH_PARTITION", "")
    if typed and own and typed != own:
        raise InputError(
            expected="one partition",
            found=f"PARTITION={typed} and SBATCH_PARTITION={own}, which sbatch would take",
            remedy="unset SBATCH_PARTITION",
        )
    return checked("partition", typed or own)


def quoted(words: Sequence[str]) -> str:
    """Join words to one line of shell.

    Raises:
        InputError: A word has control characters, such as a line's end.
    """
    for word in words:
        if not word.isprintable():
            raise InputError(
                expected="printable arguments", found=f"{word!r}", remedy="put such values into a config file"
            )
    return shlex.join(words)


def read_template(path: Path) -> str:
    """Read the template of a job.

    Raises:
        InputError: It is not here.
    """
    if not path.is_file():
        raise InputError(
            expected=f"the job's template at {path}",
            found=f"none in {Path.cwd()}",
            remedy="run from the folder that has the Makefile",
        )
    return path.read_text()


def fill(template: str, values: Mapping[str, str], path: Path = TEMPLATE) -> str:
    """Fill the template; an ``#SBATCH`` line whose value is empty is left out.

    Args:
        template: Text with ``$placeholders``.
        values: Placeholder -> text, safe where it stands.
        path: Where the text comes from, for messages.

    Raises:
        InputError: A placeholder without a value, a value without a placeholder, or a stray dollar sign.
    """
    parsed = string.Template(template)
    if not parsed.is_valid():
        raise InputError(
            subject=path,
            expected="a dollar sign before each name to fill in",
            found="one before something else",
            remedy="write a dollar sign that is meant for the shell twice",
        )
    names = set(parsed.get_identifiers())
    given = {name for name, value in values.items() if value}
    if unknown := sorted(names - values.keys()):
        raise InputError(
            subject=path,
            expected=f"placeholders among {sorted(values)}",
            found=unknown,
            remedy="remove them, or write a dollar sign that is meant for the shell twice",
        )
    if unused := sorted(given - names):
        raise InputError(
            subject=path,
            expected=f"a place for {unused}",
            found="none",
            remedy="put the placeholder back into the template",
        )
    lines = template.splitlines()
    empty = [place for name, value in values.items() if not value for place in (f"${name}", f"${{{name}}}")]
    kept = [line for line in lines if not (line.startswith("#SBATCH") and line.endswith(tuple(empty)))]
    return string.Template("\n".join(kept) + "\n").substitute(values)


def node_shapes(partition: str) -> list[NodeShape]:
    """Ask Slurm for the nodes of a partition ("" means the default one).

    Raises:
        InputError: Slurm does not answer, or knows no such partition.
    """
    checked("partition", partition)
    rows = _run("sinfo", "--all", "--noheader", "--Node", "--format=%P|%c|%N|%G").splitlines()
    entries = [row.strip().split("|", 3) for row in rows]
    wanted, usable = partition.split(","), _usable_cpus()
    shapes = [
        NodeShape(usable.get(node, int(cpus)), sum(map(int, re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))))
        for name, cpus, node, gres in entries
        if (name.removesuffix("*") in wanted if partition else name.endswith("*"))
    ]
    if not shapes:
        known = sorted({name for name, *_ in entries})
        raise InputError(
            expected=f"the nodes of partition {partition or '(the default one)'}",
            found=f"the partitions {known}",
            remedy="name one of them: PARTITION=",
        )
    return shapes


def _usable_cpus() -> dict[str, int]:
    """Return how many CPUs of each node jobs get: `sinfo` counts those that CoreSpecCount reserves for the system too.

    Empty where Slurm does not say (before 22.05).
    """
    if shutil.which("scontrol") is None:
        return {}
    nodes = _run("scontrol", "--oneliner", "show", "node").splitlines()
    found = (re.search(r"NodeName=(\S+) .*\bCPUEfctv=(\d+)", node) for node in nodes)
    return {match[1]: int(match[2]) for match in found if match}


def gpus_a_node(partition: str) -> int:
    """Ask Slurm how many GPUs a node has, for a command line that does not say.

    Raises:
        InputError: There is no Slurm, or its nodes differ.
    """
    if not available():
        raise InputError(
            expected="GPUS", found="none", remedy="GPUS=8 is eight GPUs a node, GPUS=0 takes CPUs alone"
        )
    found = sorted({shape.gpus for shape in node_shapes(partition)})
    if len(found) > 1:
        raise InputError(
            expected="GPUS", found=f"none, and nodes with {found} GPUs", remedy="say how many a node: GPUS="
        )
    print(f"GPUS is not given: the nodes of this partition have {found[0]}.")
    return found[0]


def cpus_a_process(partition: str, gpus: int, processes: int) -> int:
    """Return a process's share of a node's CPUs; a GPU has its share even if the others of its node are not ours.

    Slurm's own default, one CPU, starves the data loader.

    Raises:
        InputError: There are more processes than CPUs, for which the job would wait for ever.
    """
    shapes = node_shapes(partition)
    share = min(shape.cpus // (max(shape.gpus, gpus) or processes) for shape in shapes)
    if share < 1:
        fewest = min(shape.cpus for shape in shapes)
        raise InputError(
            expected=f"at most {fewest} processes a node, as many as it has CPUs",
            found=processes,
            remedy="lower them",
        )
    return share


def submit(script: Path) -> str:
    """Submit a job script and return the job's id.

    Raises:
        InputError: Slurm refuses it.
    """
    return _run("sbatch", "--parsable", str(script)).strip().split(";")[0]


def container_options(image: str, folders: Sequence[str | Path]) -> list[str]:
    """Return srun's options (pyxis) that run a step in an image, with the working folder and others mounted.

    Args:
        image: Image, as enroot names it, or a .sqsh file; "" means no container.
        folders: What must be seen inside at the same path; those below the working folder are, and URLs need not.

    Raises:
        InputError: A path that a mount cannot name.
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
        said = done.stderr.strip() or "nothing"
        raise InputError(
            expected=f"`{command[0]}` to succeed",
            found=f"status {done.returncode}: {said}",
            remedy=(
                "correct what it names, or ask whoever runs the cluster; MASTER=localhost with GPUS= "
                "starts processes here without Slurm, and `make render-shards` without NODES= renders "
                "here"
            ),
        )
    return done.stdout
