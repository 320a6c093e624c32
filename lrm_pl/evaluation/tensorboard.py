"""TensorBoard events of an evaluation, with a table, metrics, images, and orbit videos and meshes of a few objects."""

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
from lrm_pl.evaluation.page import rank_objects
from lrm_pl.evaluation.records import OBJECTS_NAME, ObjectRecord, read_arrays
from lrm_pl.inference.scene import Scene, to_uint8
from lrm_pl.inference.video import encode_gif
from lrm_pl.meshing.surface import NoSurfaceError

#: Subfolder with TensorBoard events.
BOARD_NAME = "board"

#: Subfolder with orbit videos (.gif) and meshes (.npz) of a few objects.
SHOWN_NAME = "shown"

#: Number of objects with an orbit video and a mesh.
SHOWN_OBJECTS = 3

_FRAMES, _SIDE, _RESOLUTION, _FACES = 24, 128, 128, 20_000


def show_object(out: Path, key: str, scene: Scene) -> None:
    """Write an orbit video and a mesh of an object. The mesh is empty if there is no surface."""
    folder = out / SHOWN_NAME
    folder.mkdir(parents=True, exist_ok=True)
    frames = [to_uint8(frame) for frame in scene.orbit(_FRAMES, _SIDE, 15.0)]
    write_atomically(folder / f"{key}.gif", encode_gif(frames))
    try:
        mesh = scene.mesh(resolution=_RESOLUTION, max_faces=_FACES)
        arrays = mesh.vertices, mesh.faces, np.rint(mesh.colors * 255).astype(np.uint8)
    except NoSurfaceError:  # the record states the reason
        arrays = (np.empty((0, 3)),) * 3
    file = io.BytesIO()
    np.savez(file, vertices=arrays[0], faces=arrays[1], colors=arrays[2])
    write_atomically(folder / f"{key}.npz", file.getvalue())


def is_shown(out: Path, key: str) -> bool:
    """Return whether the orbit video and the mesh of an object exist."""
    return all((out / SHOWN_NAME / f"{key}{ending}").is_file() for ending in (".gif", ".npz"))


def write_board(
    out: Path,
    name: str,
    table: str,
    rows: Mapping[str, Mapping[str, float]],
    records: Sequence[ObjectRecord],
    better: Mapping[str, bool],
    step: int,
) -> None:
    """Write the TensorBoard events of an evaluation, and delete events from a previous run.

    Args:
        out: Folder of the evaluation.
        name: Name of the protocol.
        table: Markdown table of the results.
        rows: Mean metrics of the model and the baselines.
        records: Records of the evaluated objects.
        better: Names of metrics, and whether higher values are better.
        step: Training step of the model.
    """
    folder = out / BOARD_NAME
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as board:
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
            arrays = read_arrays(path)
            if not len(arrays["faces"]):
                continue
            parts = [torch.from_numpy(arrays[part])[None] for part in ("vertices", "colors", "faces")]
            board.add_mesh(f"{name}/mesh/{path.stem}", *parts, global_step=step)
        first = next((metric for metric in better if metric in rows["model"]), None)
        if first is None:
            return
        for group, chosen in rank_objects(records, first, more_is_better=better[first]).items():
            strips = [np.asarray(Image.open(out / OBJECTS_NAME / f"{record.id}.png")) for record in chosen]
            if strips:
                width = max(strip.shape[1] for strip in strips)
                pads = [((0, 0), (0, width - strip.shape[1]), (0, 0)) for strip in strips]
                padded = [np.pad(s, pad, constant_values=255) for s, pad in zip(strips, pads, strict=True)]
                board.add_image(f"{name}/{group}", np.concatenate(padded), step, dataformats="HWC")
