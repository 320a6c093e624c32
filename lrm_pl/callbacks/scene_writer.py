"""Writer of the results of ``lrm predict``, that is, a mesh, an orbit video and an image grid of each object."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image

from lrm_pl.data.batch import Batch
from lrm_pl.data.manifest import write_atomically
from lrm_pl.images import encode_png
from lrm_pl.inference.options import MeshOptions
from lrm_pl.inference.result_folder import RECORD_NAME
from lrm_pl.inference.scene import Scene, to_uint8
from lrm_pl.inference.video import encode_video, make_grid
from lrm_pl.meshing.export import encode_mesh
from lrm_pl.meshing.surface import NoSurfaceError

logger = logging.getLogger(__name__)

#: Options of the mesh and the orbit.
OPTIONS = MeshOptions()


class SceneWriter(L.Callback):
    """Callback that writes mesh.glb, orbit.mp4, grid.png and result.json of each object to FOLDER/ID.

    The file result.json is written last. It records the model, the camera and the options.

    Args:
        folder: Output folder.
        metadata: Entries to include in each result.json, such as the model and the versions.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any]) -> None:
        self.folder, self.metadata = folder, metadata

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the results of all objects in a batch, except for padding."""
        assert isinstance(outputs, list)
        for index, (key, scene) in enumerate(zip(batch.ids, outputs, strict=True)):
            if batch.weight[index]:
                self._write(self.folder / key, key, scene, batch, index)

    def _write(self, folder: Path, key: str, scene: Scene, batch: Batch, index: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD_NAME).unlink(missing_ok=True)
        orbit = scene.orbit(OPTIONS.frames, OPTIONS.size, OPTIONS.elevation_deg)
        frames = [to_uint8(frame) for frame in orbit]
        source = Image.fromarray(to_uint8(batch.input.images[index, 0].permute(1, 2, 0))).convert("RGBA")
        files = {"orbit.mp4": encode_video(frames), "grid.png": encode_png(make_grid(source, frames))}
        shape, notes = None, list[str]()
        try:
            density = scene.threshold
            mesh = scene.mesh(resolution=OPTIONS.resolution)
            files |= encode_mesh(mesh, "glb")
            shape = {"vertices": len(mesh.vertices), "faces": len(mesh.faces), "threshold": density}
        except NoSurfaceError as error:
            logger.warning("No mesh was written for %s: %s", key, error)
            notes.append(f"No mesh: {error}")
            (folder / "mesh.glb").unlink(missing_ok=True)  # written by an earlier run
        for name, content in files.items():
            write_atomically(folder / name, content)
        record = self.metadata | {
            "object": key,
            "camera": dataclasses.asdict(scene.camera),
            "mesh": shape,
            "options": {name: getattr(OPTIONS, name) for name in ("resolution", "frames", "size")},
            "warnings": notes,
            "files": sorted(files),
        }
        write_atomically(folder / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
