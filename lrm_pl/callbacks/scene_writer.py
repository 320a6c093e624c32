"""Writer of the results of ``lrm predict``, that is, a mesh, an orbit video and an image grid of each object."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from lrm_pl.data.batch import Batch
from lrm_pl.data.manifest import write_atomically
from lrm_pl.images import encode_png
from lrm_pl.inference.scene import Scene, to_uint8
from lrm_pl.inference.video import encode_video, make_grid
from lrm_pl.meshing.export import encode_mesh
from lrm_pl.meshing.surface import NoSurfaceError

logger = logging.getLogger(__name__)

RECORD_NAME = "result.json"


class SceneWriter(L.Callback):
    """Callback that writes mesh.glb, orbit.mp4, grid.png and result.json of each object to FOLDER/ID.

    The file result.json is written last. It records the model, the camera and the options.

    Args:
        folder: Output folder.
        metadata: Entries of every result.json, such as the model and the versions.
        resolution: Number of points of the density grid along each axis.
        frames: Number of frames of the orbit video.
        size: Side of a frame in pixels.
    """

    def __init__(
        self, folder: Path, metadata: dict[str, Any], resolution: int = 256, frames: int = 60, size: int = 256
    ) -> None:
        self.folder, self.metadata = folder, metadata
        self.resolution, self.frames, self.size = resolution, frames, size

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the results of the objects of a batch, except for padding."""
        scenes: list[Scene] = outputs
        for index, (key, scene) in enumerate(zip(batch.ids, scenes, strict=True)):
            if batch.weight[index]:
                self._write(self.folder / key, key, scene, batch, index)

    def _write(self, folder: Path, key: str, scene: Scene, batch: Batch, index: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECORD_NAME).unlink(missing_ok=True)
        frames = [to_uint8(frame) for frame in scene.orbit(self.frames, self.size, 15.0)]
        pixels = batch.input.images[index, 0].float().cpu().permute(1, 2, 0).numpy()
        source = Image.fromarray((pixels * 255).round().astype(np.uint8)).convert("RGBA")
        files = {"orbit.mp4": encode_video(frames), "grid.png": encode_png(make_grid(source, frames))}
        shape, notes = None, list[str]()
        try:
            density = scene.threshold
            mesh = scene.mesh(resolution=self.resolution)
            files |= encode_mesh(mesh, "glb")
            shape = {"vertices": len(mesh.vertices), "faces": len(mesh.faces), "threshold": density}
        except NoSurfaceError as error:
            logger.warning("No mesh of %s: %s", key, error)
            notes.append(f"No mesh: {error}")
            (folder / "mesh.glb").unlink(missing_ok=True)  # written by an earlier run
        for name, content in files.items():
            write_atomically(folder / name, content)
        record = self.metadata | {
            "object": key,
            "camera": dataclasses.asdict(scene.camera),
            "mesh": shape,
            "options": {"resolution": self.resolution, "frames": self.frames, "size": self.size},
            "warnings": notes,
            "files": sorted(files),
        }
        write_atomically(folder / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
