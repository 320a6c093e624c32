"""Blender side: depth and normals of the view that was rendered last, from the same samples as its colors. Needs bpy.

Blender hands passes out as an OpenEXR file only; the OpenImageIO that comes with Blender reads it.
"""

import os
import sys
from pathlib import Path
from types import ModuleType

import bpy
import numpy as np
import numpy.typing as npt

#: A surface of less opacity is not there: 8 bits would not show it. More than that must not be looked through, for
#: Cycles does so by chance, sample by sample.
_OPACITY = 1 / 512

#: Cycles gives this depth, or more, where it meets nothing.
_NOTHING = 1e9


def enable_passes(*, normals: bool) -> None:
    """Have Cycles keep the depth of each pixel, and its normals; to be called once the scene is set up."""
    layer = bpy.context.scene.view_layers[0]
    layer.use_pass_z, layer.use_pass_normal = True, normals
    layer.pass_alpha_threshold = _OPACITY


def read_geometry(
    alpha: npt.NDArray[np.uint8], scratch: Path
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Return what the view that was rendered last shows as geometry.

    Cycles' depth is that of its first sample, which goes through the pixel's center, along the camera's z axis. Its
    normals are those of the shading, on the side that the camera sees; they are averages over the pixel, and made of
    length 1 again here.

    Args:
        alpha: (H, W) alpha of the view.
        scratch: Folder for Blender's own file.

    Returns:
        (H, W) depth in scene units, and (H, W, 3) world normals if they are kept; 0 where alpha is 0 or nothing is at
        the pixel's center.
    """
    passes = _read(scratch)
    depth = passes["Depth"][..., 0]
    seen = (depth < _NOTHING) & (alpha > 0)
    depth = np.where(seen, depth, 0)
    if "Normal" not in passes:
        return depth, None
    length = np.linalg.norm(passes["Normal"], axis=-1, keepdims=True)
    return depth, np.where(seen[..., None] & (length > 0), passes["Normal"] / np.maximum(length, 1e-12), 0)


def _read(scratch: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Write the passes of the last image to a file and read them: name -> (H, W, channels)."""
    path = os.fspath(scratch / "passes.exr")
    image = bpy.context.scene.render.image_settings
    kept = {
        name: getattr(image, name) for name in ("file_format", "color_mode", "color_depth", "compression")
    }
    image.media_type, image.file_format = "MULTI_LAYER_IMAGE", "OPEN_EXR_MULTILAYER"
    image.color_depth, image.exr_codec, image.use_exr_interleave = "32", "NONE", False
    try:
        bpy.data.images["Render Result"].save_render(path, scene=bpy.context.scene)
    finally:
        image.media_type = "IMAGE"
        for name, value in kept.items():
            setattr(image, name, value)
    oiio = _open_image_io()
    file = oiio.ImageInput.open(path)
    if file is None:
        raise RuntimeError(f"passes cannot be read: {oiio.geterror()}")
    passes: dict[str, npt.NDArray[np.float32]] = {}
    while file.seek_subimage(len(passes), 0):  # a part a pass, of channels such as ViewLayer.Normal.X
        names = file.spec().channelnames
        pixels = file.read_image(len(passes), 0, 0, len(names), oiio.FLOAT)
        if pixels is None:
            raise RuntimeError(f"passes cannot be read: {file.geterror()}")
        passes[names[0].split(".")[-2]] = pixels
    file.close()
    Path(path).unlink()
    return passes


def _open_image_io() -> ModuleType:
    """Import Blender's own OpenImageIO, which its wheel keeps apart."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = os.path.join(bpy.utils.resource_path("LOCAL"), "python", "lib", python, "site-packages")
    if folder not in sys.path:
        sys.path.append(folder)
    import OpenImageIO

    return OpenImageIO
