"""Find a trained model on this machine. Imports nothing heavy, so that a wrong path is reported at once."""

import re
from pathlib import Path

from lrm_pl.errors import InputError
from lrm_pl.storage import HUB

#: Default folder of `lrm fit` runs.
RUNS = Path("runs/lrm")

_VERSION, _CHECKPOINT = re.compile(r"version_\d+"), re.compile(r"step-\d{8,}")


def find_model(name: str | None) -> str:
    """Return the name of a trained model after checking that it exists; the newest run if None.

    Args:
        name: Run folder, checkpoint, exported folder, URL, or ``hf://owner/name`` on the Hugging Face Hub. URLs are
            not opened.

    Raises:
        InputError: The path does not exist, or there is no run.
    """
    name = name or newest_run()
    if "://" not in name and not Path(name).expanduser().exists():
        raise InputError(
            expected="a run, a checkpoint or a folder of `lrm export`",
            found=f"nothing at {name}",
            remedy=f"correct the path, or use {HUB}owner/name for a model on the Hugging Face Hub",
        )
    return name


def newest_run() -> str:
    """Return the newest run in ``runs/lrm`` that has a checkpoint.

    Raises:
        InputError: There is no such run.
    """
    runs = [
        path
        for path in RUNS.glob("version_*")
        if _VERSION.fullmatch(path.name)
        and any(_CHECKPOINT.fullmatch(found.name) for found in path.glob("checkpoints/step-*"))
    ]
    if not runs:
        raise InputError(
            expected=f"a trained model in {RUNS}",
            found="none",
            remedy="train the demo (make train, ten minutes), or give a run, a checkpoint or an exported folder: "
            "CKPT=... (--ckpt)",
        )
    return str(max(runs, key=lambda path: int(path.name.removeprefix("version_"))))
