"""What becomes of an image: a mesh, an orbit, and a record of what was done with what."""

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lrm_pl import __version__
from lrm_pl.data.manifest import write_atomically
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import InputCamera
from lrm_pl.inference.find_model import Trained
from lrm_pl.inference.mesh_options import TEXTURE_FACES, MeshOptions
from lrm_pl.inference.scene import Scene, as_pixels, as_tensor
from lrm_pl.inference.video import encode_video, grid
from lrm_pl.meshing.export import encode_mesh
from lrm_pl.meshing.mesh import Mesh
from lrm_pl.meshing.unwrap import UnwrapError
from lrm_pl.progress import Listener, listening, stage
from lrm_pl.version import git_commit

#: Written first and last.
RECORD_NAME = "result.json"


def make_mesh(scene: Scene, wishes: MeshOptions) -> tuple[Mesh, list[str]]:
    """Make the mesh of an object.

    Returns:
        The mesh, and what was not as it was wished.

    Raises:
        NoSurfaceError: There is no surface.
    """
    most = TEXTURE_FACES if wishes.most_faces is None and wishes.texture else wishes.most_faces
    mesh = scene.mesh(wishes.threshold, wishes.resolution, floaters=wishes.floaters, most_faces=most)
    notes = []
    if most is not None and len(mesh.faces) > most:
        notes.append(f"{len(mesh.faces)} faces instead of {most}: fewer would tear the surface")
    if not wishes.texture:
        return mesh, notes
    try:
        return scene.textured(mesh, wishes.texture, wishes.texture_limit_s), notes
    except UnwrapError as error:
        return mesh, [*notes, f"colors at the vertices instead of a texture: {error}"]


def require_video() -> None:
    """Make sure, before objects are reconstructed, that an orbit can be written.

    Raises:
        InputError: It cannot.
    """
    encode_video([np.zeros((16, 16, 3), np.uint8)])


def infer(
    trained: Trained, image: Path, out: Path, wishes: MeshOptions, listener: Listener | None = None
) -> dict[str, Any]:
    """Make everything of one image: the mesh and what the network saw are written before the orbit is rendered.

    Args:
        trained: The network.
        image: The file.
        out: Folder of the results; files of an earlier result, which its result.json lists, are replaced or removed.
        wishes: What is made.
        listener: Told what is being done.

    Returns:
        What result.json holds. Its "finished" is false until all files lie there.

    Raises:
        RemoverError: There is nothing that takes backgrounds out, and this image has one.
        InputError: It is no image, there is no surface, or a file in OUT is not of an earlier result.
    """
    model = trained.model
    earlier = _files_of(out)
    _require_own(out, _files_for(wishes), earlier)
    files, orbit = dict[str, bytes](), dict[str, bytes]()
    with listening(listener, trained.wait) as seconds:
        framed = model.preprocess(image)
        scene = model(as_tensor(framed), _camera(trained, wishes))
        mesh, notes = make_mesh(scene, wishes)
        with stage("files"):
            for kind in wishes.formats:
                files |= encode_mesh(mesh, kind)
            files["input.png"] = _png(framed)
        record = {
            "image": str(image),
            "network": {"source": trained.source, "step": trained.step, "sha256": trained.sha256},
            "background": model.remover.what if "background" in seconds else "transparent already",
            "camera": dataclasses.asdict(scene.camera),
            "setup": dataclasses.asdict(model.setup),
            "threshold": scene.threshold if wishes.threshold is None else wishes.threshold,
            "mesh": {
                "vertices": len(mesh.vertices),
                "faces": len(mesh.faces),
                "texture": None if mesh.texture is None else list(mesh.texture.image.shape[1::-1]),
            },
            "wishes": dataclasses.asdict(wishes),
            "notes": [trained.note, *notes] if trained.note else notes,
            "seconds": _rounded(seconds),
            "files": sorted(files),
            "finished": not wishes.frames,
            "device": str(next(model.parameters()).device),
            "versions": {"lrm_pl": __version__, "commit": git_commit(), "torch": torch.__version__},
        }
        _require_own(out, files, earlier)
        _write(out, files, record, earlier)
        if wishes.frames:
            with stage("orbit"):
                frames = [
                    as_pixels(frame)
                    for frame in scene.orbit(wishes.frames, wishes.size, wishes.elevation_deg)
                ]
            with stage("files"):
                orbit = {"orbit.mp4": encode_video(frames), "grid.png": _png(grid(framed, frames))}
            record |= {
                "seconds": _rounded(seconds),
                "files": sorted({*files, *orbit}),
                "finished": True,
            }
            _write(out, orbit, record, {*files, RECORD_NAME})
    return record


def _write(out: Path, files: Mapping[str, bytes], record: Mapping[str, Any], present: set[str]) -> None:
    """Write files of a result, remove those that are of an earlier one, and write the record of what is left.

    Args:
        out: Folder of the result.
        files: What is written.
        record: Its "files" are those that stay.
        present: Files of ours that lie there. Until all is done, the record lists them and the new ones: a run that is
            interrupted leaves no file that the next one would take for the user's.
    """
    out.mkdir(parents=True, exist_ok=True)
    stay = set(record["files"])
    gone = present - stay - {RECORD_NAME}
    _write_record(out, {**record, "files": sorted(stay | gone), "finished": False})
    for name, content in files.items():
        write_atomically(out / name, content)
    for name in gone:
        (out / name).unlink(missing_ok=True)
    _write_record(out, record)


def _write_record(out: Path, record: Mapping[str, Any]) -> None:
    write_atomically(out / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def _camera(trained: Trained, wishes: MeshOptions) -> InputCamera:
    """Return the camera of training, but for what is wished otherwise."""
    usual = trained.model.setup.camera
    return InputCamera(
        usual.distance if wishes.distance is None else wishes.distance,
        usual.fov_deg if wishes.fov_deg is None else wishes.fov_deg,
    )


def _files_for(wishes: MeshOptions) -> set[str]:
    """Return the files that an image will surely get."""
    orbit = {"orbit.mp4", "grid.png"} if wishes.frames else set[str]()
    return {"input.png", RECORD_NAME, *(f"mesh.{kind}" for kind in wishes.formats)} | orbit


def _files_of(out: Path) -> set[str]:
    """Return the files of an earlier result; those that result.json lists, and itself."""
    try:
        files = json.loads((out / RECORD_NAME).read_text())["files"]
        return {name for name in files if isinstance(name, str) and name == Path(name).name} | {RECORD_NAME}
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _require_own(out: Path, files: Iterable[str], earlier: set[str]) -> None:
    """Refuse to write over files that are of no earlier result.

    Raises:
        InputError: There are some.
    """
    if foreign := sorted(name for name in files if name not in earlier and (out / name).exists()):
        raise InputError(
            expected=f"only files of an earlier `lrm infer` in {out}",
            found=f"{', '.join(foreign)}, which its {RECORD_NAME} does not list",
            remedy="move them away, or give another --out",
        )


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
