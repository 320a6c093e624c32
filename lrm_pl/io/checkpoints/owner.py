"""Who writes into a folder of checkpoints: the run that came last. An object store has no locks, so it is asked.

A run signs when it starts, in place of one that was killed there, and looks before each checkpoint that nobody has
signed since. Of two runs at work in one folder the older stops at its next checkpoint, before it writes anything.
"""

import datetime
import json
import socket
import uuid

from lrm_pl.errors import InputError
from lrm_pl.io.checkpoints.store import writing
from lrm_pl.stores import open_store, talking_to

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
        fs, inner = open_store(self.folder)
        with talking_to(self.folder):
            content = fs.cat_file(f"{inner}/{OWNER_NAME}")
        try:
            found = json.loads(content)
        except ValueError:
            found = content[:80]
        if found != self._signature:
            raise InputError(
                f"expected to be the only run that writes into {self.folder}, found that another took it over: "
                f"{found}; this one ends, and what it had written is whole; give each run a folder of its own"
            )
