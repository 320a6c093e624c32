"""Checks that folders are writable, have enough free space, and are shared by all nodes."""

import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.cluster.checks.findings import Finding

GB = 1 << 30
#: Free space in GB that one checkpoint needs, and that a long run of a large model needs.
MINIMUM_GB, RECOMMENDED_GB = 2, 20


def writable(check: str, folder: Path) -> Finding:
    """Check that a folder can be created and written to, and that it has enough free space."""
    probe = folder / f".doctor-{os.uname().nodename}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"doctor")
        probe.unlink()
    except OSError as error:
        remedy = f"give this user write access to {folder}, free space on its disk, or choose another folder"
        return Finding(check, f"{folder}: {error.strerror}", remedy)
    return free_space(check, folder, shutil.disk_usage(folder).free)


def free_space(check: str, folder: Path, free: int) -> Finding:
    """Check the free space of a writable folder.

    Args:
        check: Name of the check.
        folder: The folder.
        free: Free space in bytes.
    """
    missing = f"free {MINIMUM_GB} GB, the size of a checkpoint, or choose another folder"
    warning = f"free {RECOMMENDED_GB} GB, because checkpoints of a large model may fill the disk"
    return Finding(
        check,
        f"{folder}: writable, {free // GB} GB free",
        missing=missing if free < MINIMUM_GB * GB else "",
        warning=warning if free < RECOMMENDED_GB * GB else "",
    )


def token(folder: Path, job: str, node: str) -> Path:
    """Return the path of the file whose existence shows that ``node`` shares the folder."""
    return folder / f".doctor-{job}-{node}"


def write_token(folder: Path, job: str, node: str) -> None:
    """Create the token file of this node, whose path is ``token(folder, job, node)``.

    Errors are ignored because ``writable`` reports the reason and the other nodes report the missing token.
    """
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        token(folder, job, node).write_text(node)


def unseen_tokens(folder: Path, job: str, nodes: Sequence[str], timeout_s: float) -> list[str]:
    """Return the nodes whose tokens do not appear in time.

    Args:
        folder: The folder that contains the tokens.
        job: ID of the Slurm job.
        nodes: Names of the nodes.
        timeout_s: Maximum waiting time in seconds. Network file systems may show new files with a delay.
    """
    until = time.monotonic() + timeout_s
    while missing := [node for node in nodes if not token(folder, job, node).is_file()]:
        if time.monotonic() > until:
            break
        time.sleep(min(1.0, timeout_s))
    return missing


def shared(check: str, folder: Path, missing: Sequence[str], *, needed: bool) -> Finding:
    """Report whether all nodes share a folder.

    Args:
        check: Name of the check.
        folder: The folder.
        missing: Names of the nodes whose tokens are not in the folder.
        needed: Whether the run cannot start if the folder is not shared.
    """
    if not missing:
        return Finding(check, f"{folder.absolute()}: shared by all nodes")
    found = f"{folder.absolute()}: not shared with {', '.join(missing)}"
    if needed:
        return Finding(check, found, missing="choose a folder on a file system that all nodes share")
    return Finding(check, found, warning="set LRM_CACHE to a shared folder to download files only once")
