"""Where a trained model lies. Imports nothing heavy, so that a wrong path is reported at once."""

import re
from pathlib import Path

from lrm_pl.errors import InputError
from lrm_pl.storage import HUB

#: Where `lrm fit` puts runs that were given no folder.
RUNS = Path("runs/lrm")

_VERSION, _CHECKPOINT = re.compile(r"version_\d+"), re.compile(r"step-\d{8,}")


def locate_network(name: str | None) -> str:
    """Make sure that something lies where a network is said to be, before anything is imported that reads it.

    Args:
        name: What `--ckpt` names; None: the newest run in ``runs/lrm``.

    Returns:
        The name.

    Raises:
        InputError: There is nothing.
    """
    name = name or newest_run()
    if "://" not in name and not Path(name).expanduser().exists():
        raise InputError(
            expected="a run, a checkpoint or a folder of `lrm export`",
            found=f"nothing at {name}",
            remedy=f"correct the path, or say {HUB}owner/name for a network on the Hugging Face hub",
        )
    return name


def newest_run() -> str:
    """Return the newest run in ``runs/lrm`` that has a checkpoint.

    Raises:
        InputError: There is none.
    """
    runs = [
        path
        for path in RUNS.glob("version_*")
        if _VERSION.fullmatch(path.name)
        and any(_CHECKPOINT.fullmatch(found.name) for found in path.glob("checkpoints/step-*"))
    ]
    if not runs:
        raise InputError(
            expected=f"a trained network in {RUNS}",
            found="none",
            remedy=(
                "train the demo (make train, ten minutes), or name a run, a checkpoint, or a folder of "
                "`lrm export`: CKPT=... (--ckpt)"
            ),
        )
    return str(max(runs, key=lambda path: int(path.name.removeprefix("version_"))))
