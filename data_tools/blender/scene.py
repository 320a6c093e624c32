"""Scene setup with uniform white light, and rendering of views as RGBA arrays. Requires bpy.

With uniform light of strength 1 and the Standard view transform, a matte surface renders in its own sRGB color.
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

#: Margin in pixels around the object's bounding box that is rendered, wider than the pixel filter.
MARGIN_PX = 2.0


def choose_device() -> str:
    """Enable GPUs and return the device; see ``device.enable_gpus``."""
    return enable_gpus(bpy.context.preferences.addons["cycles"].preferences)


def renderer_name(device: str) -> str:
    """Return the renderer's name, for example ``blender 5.0.1 cycles cpu``."""
    return f"blender {bpy.app.version_string} cycles {device}"


def set_up_scene(device: str, resolution: int, samples: int, threads: int) -> None:
    """Set all options that affect pixels, independent of Blender's defaults.

    Args:
        device: Device from ``choose_device``.
        resolution: Side of the image, pixels.
        samples: Samples per pixel.
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
    # a fixed number of independent samples per pixel, for uniform cost and noise
    cycles.samples = samples
    cycles.use_adaptive_sampling = cycles.use_denoising = False
    cycles.sampling_pattern = "TABULATED_SOBOL"
    cycles.pixel_filter_type, cycles.filter_width = "BLACKMAN_HARRIS", 1.5
    cycles.max_bounces = cycles.transmission_bounces = 4
    cycles.diffuse_bounces = cycles.glossy_bounces = 2
    cycles.transparent_max_bounces = 1024  # surfaces behind more layers would render black
    cycles.volume_bounces = 0
    # needed to light objects behind glass; they add no noise in uniform light
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
    """Record the render time of each image in seconds, without Blender's own overhead."""
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
        half_extent: (3,) half sides of the object's bounding box, centered at the origin; limits the rendered region.
        seed: Seed of Cycles.
        scratch: Folder for a temporary file, the only way to read pixels from Blender.

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
    # importance sampling would only add noise in uniform light
    world.cycles.sampling_method = "NONE"
    bpy.context.scene.world = world
