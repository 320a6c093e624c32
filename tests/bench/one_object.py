"""Render one object in one Blender process, as common rendering scripts do, with the settings of ``data_tools``.

`.venv-render/bin/python -m tests.bench.one_object MESH VIEWS RESOLUTION SAMPLES THREADS FOLDER`. Unlike
``data_tools``, it starts a process for each object, renders the whole frame, and reloads the scene for each view.
"""

import sys
from pathlib import Path

import bpy
import mathutils
import numpy as np

from data_tools.blender import load_asset
from data_tools.blender import scene as blender_scene
from data_tools.rendering.cameras import PRESETS, draw_cameras
from lrm_pl.conventions import opengl_to_opencv


def main(mesh: Path, views: int, resolution: int, samples: int, threads: int, folder: Path) -> None:
    """Render every view to a PNG in ``folder``."""
    load_asset.load_asset(mesh, "sphere")
    blender_scene.set_up_scene(blender_scene.choose_device(), resolution, samples, threads)
    blender_scene.add_camera()
    scene = bpy.context.scene
    scene.render.use_persistent_data = False
    cameras = draw_cameras(PRESETS["frame"], views, np.random.default_rng(0))
    for view in range(views):
        scene.camera.matrix_world = mathutils.Matrix(opengl_to_opencv(cameras.c2w[view]).tolist())
        scene.camera.data.lens = blender_scene.SENSOR_MM * float(cameras.fxfycxcy[view, 0])
        scene.render.filepath = str(folder / f"{view:03d}.png")
        bpy.ops.render.render(write_still=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(number) for number in sys.argv[2:6]), Path(sys.argv[6]))
