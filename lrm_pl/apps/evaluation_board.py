"""An evaluation in TensorBoard: its table, its figures, its pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lrm_pl.evaluation.folder import OBJECTS_NAME, ObjectRecord
from lrm_pl.evaluation.page import ranked


def write_board(
    out: Path,
    name: str,
    table: str,
    rows: Mapping[str, Mapping[str, float]],
    records: Sequence[ObjectRecord],
    better: Mapping[str, bool],
    step: int,
) -> None:
    """Write events into the evaluation's folder; those of an earlier finish are replaced.

    Args:
        out: The folder.
        name: Of the protocol.
        table: The results in Markdown.
        rows: Row -> metric -> mean.
        records: The objects that were measured.
        better: Metric -> whether more is better.
        step: Of the network.
    """
    for old in out.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(out)) as board:
        board.add_text(f"evaluation/{name}", table, step)
        for row, metrics in rows.items():
            for metric, value in metrics.items():
                board.add_scalar(f"{name}/{metric.replace('@', '_at_')}/{row.replace(' ', '_')}", value, step)
        first = next((metric for metric in better if metric in rows["model"]), None)
        if first is None:
            return
        for kind, chosen in ranked(records, first, more_is_better=better[first]).items():
            strips = [_picture(out, record.id) for record in chosen]
            if strips:
                width = max(strip.shape[1] for strip in strips)
                padded = [
                    np.pad(s, ((0, 0), (0, width - s.shape[1]), (0, 0)), constant_values=255) for s in strips
                ]
                board.add_image(f"{name}/{kind}", np.concatenate(padded), step, dataformats="HWC")


def _picture(out: Path, key: str) -> np.ndarray:
    with Image.open(out / OBJECTS_NAME / f"{key}.png") as image:
        return np.asarray(image.convert("RGB"))
