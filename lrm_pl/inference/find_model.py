"""Search for trained models on this machine.

Importing this module does not import torch, so that invalid paths are reported immediately.
"""

import re
from pathlib import Path

from lrm_pl.errors import InputError
from lrm_pl.storage import HUB

#: Default folder of the runs of ``lrm fit``.
RUNS = Path("runs/lrm")

_VERSION, _CHECKPOINT = re.compile(r"version_\d+"), re.compile(r"step-\d{8,}")


def find_model(name: str | None) -> str:
    """Return the name of a trained model after checking that it exists.

    Args:
        name: Path of a run folder, a checkpoint or a model folder, or a URL, which may be ``hf://owner/name`` for a
            repository on the Hugging Face Hub. URLs are not checked. If None, the newest run is used.

    Raises:
        InputError: The path does not exist, or there is no run.
    """
    name = name or newest_run()
    if "://" not in name and not Path(name).expanduser().exists():
        raise InputError(
            expected="a run, a checkpoint or a model folder",
            found=f"nothing at {name}",
            remedy=f"correct the path, or use {HUB}owner/name for a model on the Hugging Face Hub",
        )
    return name


def newest_run() -> str:
    """Return the path of the newest run in ``runs/lrm`` that has a checkpoint.

    Raises:
        InputError: No run has a checkpoint.
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
            remedy="train the demo model with `make train`, or pass a run, a checkpoint or a model folder with --ckpt "
            "(CKPT=... for make)",
        )
    return str(max(runs, key=lambda path: int(path.name.removeprefix("version_"))))
