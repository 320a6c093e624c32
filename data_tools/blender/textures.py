"""Correction of textures that Blender's importers or Cycles do not read as the formats specify.

``data_tools/blender/README.md`` lists the corrections. The module requires ``bpy``.
"""

from collections.abc import Container, Iterator
from pathlib import Path, PureWindowsPath

import bpy
import numpy as np
import numpy.typing as npt

from data_tools.assets.obj_materials import find_file


def find_textures(folder: Path) -> None:
    """Load missing images from the folder of the mesh.

    The function searches the folder for the whole path of an image, and then for the path without leading folders.
    Differences in case, Unicode normalization and path separators are ignored.

    Args:
        folder: Absolute path of the folder of the mesh.
    """
    for image in list(bpy.data.images):
        path = Path(bpy.path.abspath(image.filepath))
        if not image.filepath or image.packed_file or path.is_file():
            continue
        relative = path.relative_to(folder) if path.is_relative_to(folder) else path
        windows = PureWindowsPath(relative)
        parts = windows.parts[bool(windows.anchor) :]
        ends = ["/".join(parts[start:]) for start in range(len(parts)) if ".." not in parts[start:]]
        if found := next(filter(None, (find_file(folder, end) for end in ends)), None):
            loaded = bpy.data.images.load(str(found.absolute()), check_existing=True)
            loaded.alpha_mode = image.alpha_mode
            image.user_remap(loaded)
            bpy.data.images.remove(image)


def ignore_color_alpha() -> None:
    """Disable the multiplication of colors by alpha. Alpha that is used as opacity is not affected."""
    for image in bpy.data.images:
        if image.alpha_mode == "STRAIGHT":
            image.alpha_mode = "CHANNEL_PACKED"


def link_opacity_masks() -> None:
    """Use the brightness of an opacity texture as the opacity if the texture has no alpha.

    If alpha is 0 in all pixels, it is ignored, because some programs do not set the fourth byte of BMP and TGA files.
    """
    for material, node in _textures():
        color, alpha = node.outputs["Color"], node.outputs["Alpha"]
        others = {
            other.image for one, other in _textures() if one == material and other.outputs["Color"].is_linked
        }
        if not alpha.is_linked or not node.image.size[0]:
            continue
        opacity, links = _pixels(node.image)[:, 3], material.node_tree.links
        is_mask = not color.is_linked and node.image not in others
        if not opacity.any() and not is_mask:
            for link in list(alpha.links):
                links.remove(link)
        elif is_mask and ((opacity >= 1).all() or not opacity.any()):
            for target in [link.to_socket for link in alpha.links]:
                links.new(color, target)


def remove_bump_maps() -> None:
    """Remove bump maps that were imported as normal maps.

    An image is a bump map if the mean color differs from that of normal maps, which is approximately (0.5, 0.5, 1).
    """
    for material, node in list(_textures()):
        for link in list(node.outputs["Color"].links):
            if link.to_node.type == "NORMAL_MAP" and node.image.size[0]:
                red, green, blue = _pixels(node.image)[:, :3].mean(axis=0)
                if not (abs(red - 0.5) < 0.1 and abs(green - 0.5) < 0.1 and blue > 0.6):
                    material.node_tree.nodes.remove(link.to_node)


def _pixels(image: bpy.types.Image) -> npt.NDArray[np.float32]:
    """Return the stored pixel values of an image, shape (n, 4)."""
    pixels = np.empty(len(image.pixels), dtype=np.float32)
    image.pixels.foreach_get(pixels)
    return pixels.reshape(-1, 4)


def clamp_textures(paths: Container[str]) -> None:
    """Clamp textures instead of repeating them.

    Args:
        paths: Paths of the texture images to clamp.
    """
    for _, node in _textures():
        if str(Path(bpy.path.abspath(node.image.filepath))) in paths:
            node.extension = "EXTEND"


def assign_color_spaces() -> None:
    """Set the color space of each texture according to the use of the image.

    If an image is used both as color and as data, it is copied.
    """
    copies = dict[tuple[bpy.types.Image, bool], bpy.types.Image]()
    for _, node in _textures():
        image, color = node.image, node.outputs["Color"]
        if not image.size[0] or image.is_float or not color.is_linked:
            continue
        is_data = not _reaches_color(color)
        if image.colorspace_settings.is_data == is_data:
            continue
        if (image, is_data) not in copies:
            copies[image, is_data] = image.copy()
            copies[image, is_data].colorspace_settings.name = "Non-Color" if is_data else "sRGB"
        node.image = copies[image, is_data]


def _textures() -> Iterator[tuple[bpy.types.Material, bpy.types.ShaderNodeTexImage]]:
    """Yield (material, texture node) for all texture nodes with an image."""
    for material in bpy.data.materials:
        for node in material.node_tree.nodes if material.node_tree else ():
            if node.type == "TEX_IMAGE" and node.image:
                yield material, node


def _reaches_color(socket: bpy.types.NodeSocket) -> bool:
    """Return whether an output is connected, directly or indirectly, to a color input of a shader."""
    for link in socket.links:
        node, target = link.to_node, link.to_socket
        if any(output.type == "SHADER" for output in node.outputs):
            if target.type == "RGBA":
                return True
        elif any(_reaches_color(output) for output in node.outputs):
            return True
    return False
