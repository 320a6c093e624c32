"""Depth and normal passes of the last rendered view.

Blender exports passes only as OpenEXR files, which are read with the OpenImageIO library from Blender's wheel. The
module requires ``bpy``.
"""

import os
import sys
from pathlib import Path
from types import ModuleType

import bpy
import numpy as np
import numpy.typing as npt

#: Minimum opacity of surfaces that are included in the passes. Lower opacities are rounded to 0 in 8 bits. If the
#: threshold were higher, Cycles would randomly skip transparent surfaces.
_OPACITY = 1 / 512

#: Depth above which a pixel does not show a surface.
_NOTHING = 1e9


def enable_passes(*, normals: bool) -> None:
    """Enable the depth pass and optionally the normal pass. ``set_up_scene`` must be called before this function."""
    layer = bpy.context.scene.view_layers[0]
    layer.use_pass_z, layer.use_pass_normal = True, normals
    layer.pass_alpha_threshold = _OPACITY


def read_geometry(
    alpha: npt.NDArray[np.uint8], scratch: Path
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
    """Return the depth and normals of the last rendered view.

    The depth is computed by the first sample of Cycles, which passes through the center of the pixel. It is measured
    along the z axis of the camera. Normals are shading normals that point toward the camera. They are averaged over the
    pixel and normalized.

    Args:
        alpha: (H, W) alpha of the view.
        scratch: Folder for a temporary file.

    Returns:
        (H, W) depth in scene units, and (H, W, 3) normals in world coordinates, or None if normals are not enabled.
        The values are 0 where alpha is 0 or where there is no surface at the center of the pixel.
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
    """Return the passes of the last image as a mapping from names to arrays of shape (H, W, channels)."""
    path = os.fspath(scratch / "passes.exr")
    image = bpy.context.scene.render.image_settings
    image.media_type, image.file_format = "MULTI_LAYER_IMAGE", "OPEN_EXR_MULTILAYER"
    image.color_depth, image.exr_codec, image.use_exr_interleave = "32", "NONE", False
    bpy.data.images["Render Result"].save_render(path, scene=bpy.context.scene)
    oiio = _open_image_io()
    file = oiio.ImageInput.open(path)
    if file is None:
        raise RuntimeError(f"cannot read the passes: {oiio.geterror()}")
    passes: dict[str, npt.NDArray[np.float32]] = {}
    while file.seek_subimage(len(passes), 0):  # one part per pass, with channels such as ViewLayer.Normal.X
        names = file.spec().channelnames
        pixels = file.read_image(len(passes), 0, 0, len(names), oiio.FLOAT)
        if pixels is None:
            raise RuntimeError(f"cannot read the passes: {file.geterror()}")
        passes[names[0].split(".")[-2]] = pixels
    file.close()
    Path(path).unlink()
    return passes


def _open_image_io() -> ModuleType:
    """Import OpenImageIO from Blender's wheel."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folder = os.path.join(bpy.utils.resource_path("LOCAL"), "python", "lib", python, "site-packages")
    if folder not in sys.path:
        sys.path.append(folder)
    import OpenImageIO

    return OpenImageIO
