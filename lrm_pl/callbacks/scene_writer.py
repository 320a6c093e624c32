"""Write what ``lrm predict`` reconstructs: a mesh, an orbit and a grid of each object."""

import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from lrm_pl.data.batch import Batch
from lrm_pl.data.manifest import write_atomically
from lrm_pl.inference.scene import Scene, as_pixels
from lrm_pl.inference.video import encode_video, grid
from lrm_pl.meshing.export import encode_mesh
from lrm_pl.meshing.surface import NoSurfaceError

logger = logging.getLogger(__name__)

RECORD_NAME = "result.json"


class SceneWriter(L.Callback):
    """Write FOLDER/ID/{mesh.glb, orbit.mp4, grid.png, result.json} of each object, on the rank that has it.

    result.json comes last, and says what was done with what.

    Args:
        folder: Where they go.
        resolution: Points of the mesh's lattice along each axis.
        what: What every record says: the network, the versions.
        frames: Of the orbit.
        size: Side of a frame.
    """

    def __init__(
        self, folder: Path, what: dict[str, Any], resolution: int = 256, frames: int = 60, size: int = 256
    ) -> None:
        self.folder, self.what = folder, what
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
        """Write the objects of a batch, but those that only stand in."""
        scenes: list[Scene] = outputs
        for index, (key, scene) in enumerate(zip(batch.ids, scenes, strict=True)):
            if batch.weight[index]:
                self._write(self.folder / key, key, scene, batch, index)

    def _write(self, place: Path, key: str, scene: Scene, batch: Batch, index: int) -> None:
        place.mkdir(parents=True, exist_ok=True)
        (place / RECORD_NAME).unlink(missing_ok=True)
        frames = [as_pixels(frame) for frame in scene.orbit(self.frames, self.size, 15.0)]
        pixels = batch.input.images[index, 0].float().cpu().permute(1, 2, 0).numpy()
        source = Image.fromarray((pixels * 255).round().astype(np.uint8)).convert("RGBA")
        image = io.BytesIO()
        grid(source, frames).save(image, format="PNG")
        files = {"orbit.mp4": encode_video(frames), "grid.png": image.getvalue()}
        shape, notes = None, list[str]()
        try:
            density = scene.threshold
            mesh = scene.mesh(resolution=self.resolution)
            files |= encode_mesh(mesh, "glb")
            shape = {"vertices": len(mesh.vertices), "faces": len(mesh.faces), "threshold": density}
        except NoSurfaceError as error:
            logger.warning("No mesh of %s: %s", key, error)
            notes.append(f"no mesh: {error}")
            (place / "mesh.glb").unlink(missing_ok=True)  # of an earlier start
        for name, content in files.items():
            write_atomically(place / name, content)
        record = self.what | {
            "object": key,
            "camera": dataclasses.asdict(scene.camera),
            "mesh": shape,
            "options": {"resolution": self.resolution, "frames": self.frames, "size": self.size},
            "warnings": notes,
            "files": sorted(files),
        }
        write_atomically(place / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
