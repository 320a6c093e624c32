"""Ownership of a checkpoint folder that is outside the run folder.

Object stores have no locks. A run therefore writes a signature when it starts, which replaces the signature of an
earlier run, and verifies the signature before each checkpoint. If two runs use the same folder, the run that started
first stops before it writes the next checkpoint. A run with a different name does not resume from the checkpoints in
the folder.
"""

import datetime
import json
import socket
import uuid
from typing import Any

from lrm_pl.checkpoints.files import hashed_file
from lrm_pl.checkpoints.index import list_checkpoints
from lrm_pl.errors import InputError, counted
from lrm_pl.storage import MissingError, open_store, store_errors

OWNER_NAME = "owner.json"


class Owner:
    """The signature of a run in a folder of checkpoints, which is written on construction.

    Args:
        folder: Path or URL of the folder.
        run: Name of this run, which is shown in error messages of other runs.

    Raises:
        OSError: The signature cannot be written.
    """

    def __init__(self, folder: str, run: str) -> None:
        self.folder = folder.rstrip("/")
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._signature = {"run": run, "host": socket.gethostname(), "since": since, "id": uuid.uuid4().hex}
        with hashed_file(f"{self.folder}/{OWNER_NAME}") as file:
            file.write(json.dumps(self._signature).encode())

    def require(self) -> None:
        """Check that this run still owns the folder.

        Raises:
            InputError: A run that started later uses the folder.
        """
        found = _read_signature(self.folder)
        if found != self._signature:
            raise InputError(
                expected=f"exclusive use of {self.folder} by this run",
                found=f"a newer run: {found}",
                remedy="use a separate folder for each run. The checkpoints written by this run are complete",
            )


def require_ownership(folder: str, run: str) -> None:
    """Check that a folder has no checkpoints of a different run.

    Args:
        folder: Path or URL of the folder.
        run: Name of this run.

    Raises:
        InputError: A different run has written checkpoints to the folder.
    """
    try:
        signature = _read_signature(folder)
    except (FileNotFoundError, MissingError):
        return
    owner = signature.get("run") if isinstance(signature, dict) else None
    if owner != run and (existing := list_checkpoints(folder)):
        raise InputError(
            expected=f"no checkpoints of another run in {folder}",
            found=f"{counted(len(existing), 'checkpoint')} of {owner}",
            remedy=(
                f"resume that run with --run.folder {owner}, or set a different folder for CheckpointAndResume (and "
                f"start from the checkpoint with --run.resume {existing[0]}). If this run was moved, delete "
                f"{folder.rstrip('/')}/{OWNER_NAME}"
            ),
        )


def _read_signature(folder: str) -> Any:  # noqa: ANN401 - JSON, or the first bytes of an invalid file
    fs, inner = open_store(folder)
    with store_errors(folder):
        content = fs.cat_file(f"{inner.rstrip('/')}/{OWNER_NAME}")
    try:
        return json.loads(content)
    except ValueError:
        return content[:80]
