"""Setup of a scene with uniform white light, and rendering of views as RGBA arrays.

Because the light has strength 1 and the view transform is Standard, the pixels of a matte surface have the sRGB color
of the surface. The module requires ``bpy``.
"""

import os
import time
from pathlib import Path

import bpy
import mathutils
import numpy as np
import numpy.typing as npt
from PIL import Image

from data_tools.blender.device import cycles_device, enable_gpus
from data_tools.rendering.cameras import frame_rectangle
from lrm_pl.conventions import opengl_to_opencv
from lrm_pl.data.geometry_views import MIN_DEPTH

SENSOR_MM = 36.0

#: Margin around the bounding box of the object that is also rendered, in pixels. It is wider than the pixel filter.
MARGIN_PX = 2.0


def renderer_name() -> str:
    """Return the name of the renderer, for example, ``blender 5.0.1 cycles cpu``."""
    return f"blender {bpy.app.version_string} cycles {_choose_device()}"


def _choose_device() -> str:
    return enable_gpus(bpy.context.preferences.addons["cycles"].preferences)


def set_up_scene(resolution: int, samples: int, threads: int) -> None:
    """Add a camera and a white world, and set all options that affect the pixels.

    The pixels do not depend on the default options of Blender.

    Args:
        resolution: Width and height of the image in pixels.
        samples: Number of samples per pixel.
        threads: Number of CPU threads.
    """
    scene = bpy.context.scene
    render, cycles = scene.render, scene.cycles
    render.engine = "CYCLES"
    cycles.device = cycles_device(_choose_device())
    render.resolution_x = render.resolution_y = resolution
    render.resolution_percentage = 100
    render.pixel_aspect_x = render.pixel_aspect_y = 1.0
    render.film_transparent = True
    render.dither_intensity = 0.0
    render.use_compositing = render.use_sequencer = render.use_motion_blur = render.use_simplify = False
    render.use_persistent_data = True  # keeps the scene and the BVH between the views of an object
    render.threads_mode, render.threads = "FIXED", threads
    # a fixed number of independent samples per pixel, so that cost and noise are uniform
    cycles.samples = samples
    cycles.use_adaptive_sampling = cycles.use_denoising = False
    cycles.sampling_pattern = "TABULATED_SOBOL"
    cycles.pixel_filter_type, cycles.filter_width = "BLACKMAN_HARRIS", 1.5
    cycles.max_bounces = cycles.transmission_bounces = 4
    cycles.diffuse_bounces = cycles.glossy_bounces = 2
    cycles.transparent_max_bounces = 1024  # surfaces behind more layers would be black
    cycles.volume_bounces = 0
    # objects behind glass would be black without caustics, which do not add noise in uniform light
    cycles.caustics_reflective = cycles.caustics_refractive = True
    scene.display_settings.display_device = "sRGB"
    view = scene.view_settings
    view.view_transform, view.look = "Standard", "None"
    view.exposure, view.gamma, view.use_curve_mapping = 0.0, 1.0, False
    _add_white_world()
    _add_camera()


def render_view(
    c2w: npt.NDArray[np.float32],
    focal: float,
    half_extent: npt.NDArray[np.float64],
    seed: int,
    scratch: Path,
) -> tuple[npt.NDArray[np.uint8], float]:
    """Render one view.

    Args:
        c2w: (4, 4) camera-to-world matrix in the OpenCV convention.
        focal: Focal length divided by the image side.
        half_extent: (3,) half side lengths of the bounding box of the object, which is centered at the origin. Only the
            part of the image that shows the box is rendered.
        seed: Seed of Cycles.
        scratch: Folder for a temporary image file.

    Returns:
        (H, W, 4) uint8 image in sRGB with straight alpha, and the render time in seconds. The color is (0, 0, 0) where
        alpha is 0.
    """
    scene = bpy.context.scene
    scene.camera.matrix_world = mathutils.Matrix(opengl_to_opencv(c2w).tolist())
    scene.camera.data.lens = SENSOR_MM * focal
    scene.cycles.seed = seed
    render = scene.render
    left, top, right, bottom = frame_rectangle(c2w, focal, half_extent, MARGIN_PX / render.resolution_x)
    render.use_border, render.use_crop_to_border = True, False
    render.border_min_x, render.border_max_x = left, right
    render.border_min_y, render.border_max_y = 1 - bottom, 1 - top
    file = render.image_settings  # ``passes`` sets a different format after each view
    file.media_type, file.file_format = "IMAGE", "PNG"
    file.color_mode, file.color_depth, file.compression = "RGBA", "8", 0
    path = scratch / "view.png"
    render.filepath = os.fspath(path)
    start = time.perf_counter()
    bpy.ops.render.render(write_still=True)
    seconds = time.perf_counter() - start
    with Image.open(path) as image:
        rgba = np.array(image.convert("RGBA"), dtype=np.uint8)
    path.unlink()
    rgba[rgba[..., 3] == 0] = 0
    return rgba, seconds


def _add_camera() -> None:
    data = bpy.data.cameras.new("view")
    data.sensor_fit, data.sensor_width = "HORIZONTAL", SENSOR_MM
    data.shift_x = data.shift_y = 0.0
    data.clip_start, data.clip_end = MIN_DEPTH, 1e3
    camera = bpy.data.objects.new("view", data)
    bpy.context.scene.collection.objects.link(camera)
    bpy.context.scene.camera = camera


def _add_white_world() -> None:
    world = bpy.data.worlds.new("uniform")
    world.use_nodes = True
    background = world.node_tree.nodes["Background"]
    background.inputs["Color"].default_value = (1.0, 1.0, 1.0, 1.0)
    background.inputs["Strength"].default_value = 1.0
    # importance sampling would only add noise, because the light is uniform
    world.cycles.sampling_method = "NONE"
    bpy.context.scene.world = world
