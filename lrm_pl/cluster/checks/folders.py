"""Folders: that they can be written and read, have room, and are the same folder on every node."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.cluster.checks.finding import Finding

GB = 1 << 30
#: Below the first a checkpoint hardly fits; below the second a long run of a large model fills it.
LEAST_GB, COMFORTABLE_GB = 2, 20


def writable(check: str, folder: Path) -> Finding:
    """Write a small file into a folder, which is made if need be, and measure what is free there."""
    probe = folder / f".doctor-{os.uname().nodename}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"doctor")
        probe.unlink()
    except OSError as error:
        remedy = f"give this user the right to write in {folder} and room there, or choose another folder"
        return Finding(check, f"{folder}: {error.strerror}", "missing", remedy)
    return room(check, folder, shutil.disk_usage(folder).free)


def room(check: str, folder: Path, free: int) -> Finding:
    """Judge the free bytes of a folder that can be written."""
    found = f"{folder}: writable, {free // GB} GB free"
    if free < LEAST_GB * GB:
        return Finding(
            check, found, "missing", f"a checkpoint needs up to {LEAST_GB} GB: free some, or move the folder"
        )
    if free < COMFORTABLE_GB * GB:
        return Finding(
            check, found, "warning", f"checkpoints of a large model fill it: have {COMFORTABLE_GB} GB free"
        )
    return Finding(check, found)


def token(folder: Path, job: str, node: str) -> Path:
    """Return the file by which a node shows the others that it writes into the same folder."""
    return folder / f".doctor-{job}-{node}"


def write_token(folder: Path, job: str, node: str) -> None:
    """Leave this node's token; one that cannot be written is missed by the others, and ``writable`` says why."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        token(folder, job, node).write_text(node)
    except OSError:
        return


def unseen_tokens(folder: Path, job: str, nodes: Sequence[str], patience_s: float) -> list[str]:
    """Return the nodes whose tokens do not appear within so many seconds; a network folder may show them late."""
    until = time.monotonic() + patience_s
    while missing := [node for node in nodes if not token(folder, job, node).is_file()]:
        if time.monotonic() > until:
            break
        time.sleep(min(1.0, patience_s))
    return missing


def shared(check: str, folder: Path, missing: Sequence[str], *, needed: bool) -> Finding:
    """Judge whether a folder is one and the same on all nodes, given the nodes whose tokens are not seen here."""
    if not missing:
        return Finding(check, f"{folder.absolute()}: all nodes see each other's files")
    found = f"{folder.absolute()}: files of {', '.join(missing)} are not seen"
    if needed:
        return Finding(check, found, "missing", "choose a folder on a file system that all nodes share")
    return Finding(check, found, "warning", "each node fetches for itself; share one folder: LRM_CACHE=")
