"""Reconstruction of the object in an image file, and output of the mesh, the orbit and a record to a folder."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrm_pl import __version__
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import InputCamera
from lrm_pl.images import encode_png
from lrm_pl.inference.options import MeshOptions
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.inference.scene import make_mesh, to_tensor, to_uint8
from lrm_pl.inference.video import encode_video, make_grid
from lrm_pl.meshing.export import encode_mesh
from lrm_pl.progress import Listener, listening, stage
from lrm_pl.version import git_commit

#: Name of the record of a result, which lists the other files of the result.
RECORD_NAME = "result.json"


def require_video() -> None:
    """Check that videos can be encoded.

    Raises:
        InputError: OpenCV is not installed or has no VP9 encoder.
    """
    encode_video([np.zeros((16, 16, 3), np.uint8)])


def infer(
    pipeline: LRMPipeline, image: Path, out: Path, options: MeshOptions, listener: Listener | None = None
) -> dict[str, Any]:
    """Reconstruct the object in an image file, and write the results to a folder.

    The mesh is written before the orbit is rendered. If the folder contains a result.json, the files that it lists are
    replaced or removed.

    Args:
        pipeline: Trained model.
        image: Path of the image file.
        out: Path of the folder.
        options: Options for the mesh and the orbit.
        listener: Function that is called with the name of each stage when the stage begins, or None.

    Returns:
        The content of result.json. The value of "finished" in the file is false until all files have been written.

    Raises:
        RemoverError: The image has a background, and background removal is not available.
        InputError: The image cannot be read, there is no surface, or a file that is not part of an earlier result would
            be overwritten.
    """
    earlier = _files_of(out)
    _require_own(out, _files_for(options), earlier)
    files, orbit = dict[str, bytes](), dict[str, bytes]()
    with listening(listener, pipeline.synchronize) as seconds:
        framed = pipeline.preprocess(image)
        scene = pipeline(to_tensor(framed), _camera(pipeline, options))
        mesh, warnings = make_mesh(scene, options)
        with stage("files"):
            for file_format in options.formats:
                files |= encode_mesh(mesh, file_format)
            files["input.png"] = encode_png(framed)
        record = {
            "image": str(image),
            "network": {"source": pipeline.source, "step": pipeline.step, "sha256": pipeline.sha256},
            "background": pipeline.remover.description if "background" in seconds else "transparent",
            "camera": dataclasses.asdict(scene.camera),
            "framing": dataclasses.asdict(pipeline.framing),
            "threshold": scene.threshold if options.threshold is None else options.threshold,
            "mesh": {
                "vertices": len(mesh.vertices),
                "faces": len(mesh.faces),
                "texture": None if mesh.texture is None else list(mesh.texture.image.shape[1::-1]),
            },
            "options": dataclasses.asdict(options),
            "warnings": warnings,
            "seconds": _rounded(seconds),
            "files": sorted(files),
            "finished": not options.frames,
            "device": str(pipeline.device),
            "versions": {"lrm_pl": __version__, "commit": git_commit(), "torch": torch.__version__},
        }
        _require_own(out, files, earlier)
        _write(out, files, record, earlier)
        if options.frames:
            with stage("orbit"):
                frames = [
                    to_uint8(frame)
                    for frame in scene.orbit(options.frames, options.size, options.elevation_deg)
                ]
            with stage("files"):
                orbit = {"orbit.mp4": encode_video(frames), "grid.png": encode_png(make_grid(framed, frames))}
            record |= {
                "seconds": _rounded(seconds),
                "files": sorted({*files, *orbit}),
                "finished": True,
            }
            _write(out, orbit, record, {*files, RECORD_NAME})
    return record


def _write(out: Path, files: Mapping[str, bytes], record: Mapping[str, Any], present: set[str]) -> None:
    """Write files of a result, delete obsolete files, and write the final record.

    Before the final record is written, the record in the folder lists all old and new files. If the command is
    interrupted, the next command can therefore recognize all files.

    Args:
        out: Folder of the result.
        files: Contents of the files to write, by name.
        record: Final record. Files in ``present`` that the record does not list are deleted.
        present: Names of existing files of this result or of an earlier result.
    """
    out.mkdir(parents=True, exist_ok=True)
    kept = set(record["files"])
    obsolete = present - kept - {RECORD_NAME}
    _write_record(out, {**record, "files": sorted(kept | obsolete), "finished": False})
    for name, content in files.items():
        write_atomically(out / name, content)
    for name in obsolete:
        (out / name).unlink(missing_ok=True)
    _write_record(out, record)


def _write_record(out: Path, record: Mapping[str, Any]) -> None:
    write_atomically(out / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def _camera(pipeline: LRMPipeline, options: MeshOptions) -> InputCamera:
    """Return the camera used in training, with the distance and field of view of the options if they are set."""
    default = pipeline.framing.camera
    return InputCamera(
        default.distance if options.distance is None else options.distance,
        default.fov_deg if options.fov_deg is None else options.fov_deg,
    )


def _files_for(options: MeshOptions) -> set[str]:
    """Return the names of the files that all results with the given options contain."""
    orbit = {"orbit.mp4", "grid.png"} if options.frames else set[str]()
    return {"input.png", RECORD_NAME, *(f"mesh.{file_format}" for file_format in options.formats)} | orbit


def _files_of(out: Path) -> set[str]:
    """Return the names of result.json and of the files that it lists, or an empty set if it is missing or invalid."""
    try:
        files = json.loads((out / RECORD_NAME).read_text())["files"]
        return {name for name in files if isinstance(name, str) and name == Path(name).name} | {RECORD_NAME}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _require_own(out: Path, files: Iterable[str], earlier: set[str]) -> None:
    """Check that only files of an earlier result would be overwritten.

    Raises:
        InputError: A file exists that is not part of an earlier result.
    """
    if foreign := sorted(name for name in files if name not in earlier and (out / name).exists()):
        raise InputError(
            expected=f"only files of an earlier `lrm infer` in {out}",
            found=f"{', '.join(foreign)}, which {RECORD_NAME} does not list",
            remedy="move these files to another folder, or pass another folder with --out",
        )
