"""Blender side: a scene lit by uniform white light, and one view of it as an RGBA array. Needs bpy.

Uniform light of strength 1 and the Standard view transform make a matt surface come back in its own sRGB
color.
"""

import contextlib
import os
import time
from collections.abc import Iterator
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

#: Pixels around the object's bounding box that are rendered too: more than the pixel filter reaches.
MARGIN_PX = 2.0


def choose_device() -> str:
    """Choose the device of the running Blender; see ``device.enable_gpus``."""
    return enable_gpus(bpy.context.preferences.addons["cycles"].preferences)


def renderer_name(device: str) -> str:
    """Name what makes the pixels: ``blender 5.0.1 cycles cpu``."""
    return f"blender {bpy.app.version_string} cycles {device}"


def set_up_scene(device: str, resolution: int, samples: int, threads: int) -> None:
    """Set every option that decides pixels; nothing is left to Blender's defaults that matters.

    Args:
        device: As from ``choose_device``.
        resolution: Side of the image, pixels.
        samples: Samples a pixel.
        threads: CPU threads.
    """
    scene = bpy.context.scene
    render, cycles = scene.render, scene.cycles
    render.engine = "CYCLES"
    cycles.device = cycles_device(device)
    render.resolution_x = render.resolution_y = resolution
    render.resolution_percentage = 100
    render.pixel_aspect_x = render.pixel_aspect_y = 1.0
    render.film_transparent = True
    render.dither_intensity = 0.0
    render.use_compositing = render.use_sequencer = render.use_motion_blur = render.use_simplify = False
    render.use_persistent_data = True  # keeps the scene and its BVH between the views of one object
    render.threads_mode, render.threads = "FIXED", threads
    # a fixed number of independent samples: what a pixel costs and means does not depend on the image
    cycles.samples = samples
    cycles.use_adaptive_sampling = cycles.use_denoising = False
    cycles.sampling_pattern = "TABULATED_SOBOL"
    cycles.pixel_filter_type, cycles.filter_width = "BLACKMAN_HARRIS", 1.5
    cycles.max_bounces = cycles.transmission_bounces = 4
    cycles.diffuse_bounces = cycles.glossy_bounces = 2
    cycles.transparent_max_bounces = 1024  # Cycles draws what lies behind so many layers black
    cycles.volume_bounces = 0
    # without them no light comes to what lies behind glass; in uniform light they add no noise
    cycles.caustics_reflective = cycles.caustics_refractive = True
    scene.display_settings.display_device = "sRGB"
    view = scene.view_settings
    view.view_transform, view.look = "Standard", "None"
    view.exposure, view.gamma, view.use_curve_mapping = 0.0, 1.0, False
    image = render.image_settings
    image.file_format, image.color_mode, image.color_depth, image.compression = "PNG", "RGBA", "8", 0
    _white_world()


def add_camera() -> None:
    """Add the scene's camera; ``render_view`` places it."""
    data = bpy.data.cameras.new("view")
    data.sensor_fit, data.sensor_width = "HORIZONTAL", SENSOR_MM
    data.shift_x = data.shift_y = 0.0
    data.clip_start, data.clip_end = MIN_DEPTH, 1e3
    camera = bpy.data.objects.new("view", data)
    bpy.context.scene.collection.objects.link(camera)
    bpy.context.scene.camera = camera


@contextlib.contextmanager
def cycles_clock() -> Iterator[list[float]]:
    """Note the seconds of each image between Blender's handing over to Cycles and Cycles' last pixel."""
    seconds, start = list[float](), [0.0]

    def begin(*_: object) -> None:
        start[0] = time.perf_counter()

    def end(*_: object) -> None:
        seconds.append(time.perf_counter() - start[0])

    handlers = bpy.app.handlers
    handlers.render_pre.append(begin)
    handlers.render_post.append(end)
    try:
        yield seconds
    finally:
        handlers.render_pre.remove(begin)
        handlers.render_post.remove(end)


def render_view(
    c2w: npt.NDArray[np.float32],
    focal: float,
    half_extent: npt.NDArray[np.float64],
    seed: int,
    scratch: Path,
) -> npt.NDArray[np.uint8]:
    """Render one view.

    Args:
        c2w: (4, 4) OpenCV pose.
        focal: Focal length in image sides.
        half_extent: (3,) half sides of the object's bounding box about the origin; only there is rendered.
        seed: Seed of Cycles.
        scratch: Folder for Blender's own file; Blender hands its pixels out no other way.

    Returns:
        (H, W, 4) uint8, sRGB, straight alpha; (0, 0, 0) where alpha is 0.
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
    path = scratch / "view.png"
    render.filepath = os.fspath(path)
    bpy.ops.render.render(write_still=True)
    with Image.open(path) as image:
        rgba = np.array(image.convert("RGBA"), dtype=np.uint8)
    path.unlink()
    rgba[rgba[..., 3] == 0] = 0
    return rgba


def _white_world() -> None:
    world = bpy.data.worlds.new("uniform")
    world.use_nodes = True
    background = world.node_tree.nodes["Background"]
    background.inputs["Color"].default_value = (1.0, 1.0, 1.0, 1.0)
    background.inputs["Strength"].default_value = 1.0
    # every direction is equally bright: picking directions by brightness would only add noise
    world.cycles.sampling_method = "NONE"
    bpy.context.scene.world = world
