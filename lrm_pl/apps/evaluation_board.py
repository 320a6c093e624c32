"""An evaluation in TensorBoard: its table, its figures, its pictures; of a few objects an orbit and a mesh."""

import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lrm_pl.data.manifest import write_atomically
from lrm_pl.evaluation.folder import OBJECTS_NAME, ObjectRecord
from lrm_pl.evaluation.page import ranked
from lrm_pl.inference import Scene, as_pixels
from lrm_pl.io.orbit_files import encode_gif
from lrm_pl.rendering.surface import NoSurfaceError

#: Folder of an evaluation that holds TensorBoard's events.
BOARD_NAME = "board"

#: Folder of an evaluation that holds orbits (.gif) and meshes (.npz) of a few objects.
SHOWN_NAME = "shown"

#: Objects that these are made of.
SHOWN_OBJECTS = 3

_FRAMES, _SIDE, _LATTICE, _FACES = 24, 128, 128, 20_000


def show_object(out: Path, key: str, scene: Scene) -> None:
    """Keep an orbit and a mesh of an object, for the board."""
    place = out / SHOWN_NAME
    place.mkdir(parents=True, exist_ok=True)
    frames = [as_pixels(frame) for frame in scene.orbit(_FRAMES, _SIDE, 15.0)]
    write_atomically(place / f"{key}.gif", encode_gif(frames))
    try:
        mesh = scene.mesh(resolution=_LATTICE, most_faces=_FACES)
    except NoSurfaceError:
        return  # its record says so
    file = io.BytesIO()
    colours = np.rint(mesh.colours * 255).astype(np.uint8)
    np.savez(file, vertices=mesh.vertices, faces=mesh.faces, colours=colours)
    write_atomically(place / f"{key}.npz", file.getvalue())


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
    place = out / BOARD_NAME
    shutil.rmtree(place, ignore_errors=True)
    with SummaryWriter(str(place)) as board:
        board.add_text(f"evaluation/{name}", table, step)
        for row, metrics in rows.items():
            for metric, value in metrics.items():
                board.add_scalar(f"{name}/{metric.replace('@', '_at_')}/{row.replace(' ', '_')}", value, step)
        for path in sorted((out / SHOWN_NAME).glob("*.gif")):
            image = Summary.Image(
                height=_SIDE, width=_SIDE, colorspace=3, encoded_image_string=path.read_bytes()
            )
            value = Summary.Value(tag=f"{name}/orbit/{path.stem}", image=image)
            board._get_file_writer().add_summary(Summary(value=[value]), step)
        for path in sorted((out / SHOWN_NAME).glob("*.npz")):
            with np.load(path, allow_pickle=False) as found:
                parts = [torch.from_numpy(found[part])[None] for part in ("vertices", "colours", "faces")]
            board.add_mesh(f"{name}/mesh/{path.stem}", *parts, global_step=step)
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
