"""Who writes into a folder of checkpoints that is not in the run's own: the run that came last.

A run signs when it starts, in place of one that was killed there, and looks before each checkpoint that nobody has
signed since: an object store has no locks. Of two runs at work in one folder the older stops at its next checkpoint,
before it writes anything. A run of another name does not go on from what it finds there.
"""

import datetime
import json
import socket
import uuid
from typing import Any

from lrm_pl.checkpoints.files import writing
from lrm_pl.checkpoints.index import list_checkpoints
from lrm_pl.errors import InputError
from lrm_pl.storage import MissingError, open_store, store_errors

OWNER_NAME = "owner.json"


class Owner:
    """Sign a folder of checkpoints.

    Args:
        folder: The folder or URL.
        run: How a message of another run names this one.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, folder: str, run: str) -> None:
        self.folder = folder.rstrip("/")
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._signature = {"run": run, "host": socket.gethostname(), "since": since, "id": uuid.uuid4().hex}
        with writing(f"{self.folder}/{OWNER_NAME}") as file:
            file.write(json.dumps(self._signature).encode())

    def require(self) -> None:
        """Check that the signature is still the last.

        Raises:
            InputError: Another run has signed.
        """
        found = _read_signature(self.folder)
        if found != self._signature:
            raise InputError(
                expected=f"to be the only run that writes into {self.folder}",
                found=f"that another took it over: {found}",
                remedy="this one ends, and what it had written is whole; give each run a folder of its own",
            )


def require_own(folder: str, run: str) -> None:
    """Refuse a folder with the checkpoints of another run.

    Args:
        folder: The folder or URL.
        run: What this run signs as.

    Raises:
        InputError: Another run has signed, and has left checkpoints.
    """
    try:
        found = _read_signature(folder)
    except (FileNotFoundError, MissingError):
        return
    theirs = found.get("run") if isinstance(found, dict) else None
    if theirs != run and (own := list_checkpoints(folder)):
        raise InputError(
            expected=f"no checkpoints of another run in {folder}",
            found=f"{len(own)} of {theirs}",
            remedy=(
                f"go on with that run, --run.folder {theirs}, or give the CheckpointAndResume another folder (and "
                f"--run.resume {own[0]} to begin there); if it is the same run in another place, delete "
                f"{folder.rstrip('/')}/{OWNER_NAME}"
            ),
        )


def _read_signature(folder: str) -> Any:  # noqa: ANN401 - JSON, or what stands there instead
    fs, inner = open_store(folder)
    with store_errors(folder):
        content = fs.cat_file(f"{inner.rstrip('/')}/{OWNER_NAME}")
    try:
        return json.loads(content)
    except ValueError:
        return content[:80]
