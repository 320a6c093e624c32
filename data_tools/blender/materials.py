"""Correction of materials that Blender's importers or Cycles do not read as the formats specify.

``data_tools/blender/README.md`` lists the corrections. The module requires ``bpy``.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import bpy
import numpy as np
from PIL import Image

from data_tools.assets.obj_materials import normalize_lines, translate_mtl
from data_tools.blender.attributes import read_floats
from lrm_pl.color_spaces import linear_to_srgb, srgb_to_linear


def principled_shaders(material: bpy.types.Material) -> list[bpy.types.Node]:
    """Return the Principled BSDF nodes of a material."""
    tree = material.node_tree
    return [node for node in tree.nodes if node.type == "BSDF_PRINCIPLED"] if tree else []


def prepare_obj(content: bytes, mtl_files: Iterable[Path], scratch: Path) -> Path:
    """Write a copy of an OBJ and a merged MTL with the same stem.

    ``mtllib`` statements that Blender would recognize are removed from the copy, so that Blender opens only the merged
    MTL and no unchecked files.

    Args:
        content: Content of the OBJ.
        mtl_files: MTL files of the OBJ.
        scratch: Folder for the files.

    Returns:
        Path of the copy of the OBJ.
    """
    copy = scratch / "readable.obj"
    copy.write_bytes(re.sub(rb"mtllib(?=[^\x21-\x7f]|\\)", b"#", normalize_lines(content)))
    copy.with_suffix(".mtl").write_bytes(translate_mtl(mtl_files))
    return copy


def apply_vertex_colors() -> bool:
    """Use vertex colors for materials that have neither a texture nor a color. glTF files do not require this.

    Returns:
        Whether vertex colors are used.
    """
    copies = dict[tuple[bpy.types.Material, str], bpy.types.Material]()
    _rescale_byte_colors()
    for obj in bpy.context.view_layer.objects:
        if obj.type != "MESH" or not obj.data.color_attributes:
            continue
        name = obj.data.color_attributes[0].name
        if not any(slot.material for slot in obj.material_slots):
            obj.data.materials.clear()
            obj.data.materials.append(_new_material("vertex colors")[0])
        for slot in obj.material_slots:
            if slot.material and slot.material not in copies.values() and _is_gray(slot.material):
                key = (slot.material, name)
                if key not in copies:  # meshes without vertex colors share the original material
                    copies[key] = slot.material.copy()
                    _link_vertex_colors(copies[key], name)
                slot.material = copies[key]
    return bool(copies)


def correct_fbx(path: Path) -> None:
    """Correct the colors of FBX materials, and the opacity and specular reflection if the file is binary."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if b"Blender" not in head:  # Blender writes linear colors
        shaders = [shader for material in bpy.data.materials for shader in principled_shaders(material)]
        for color in [shader.inputs[name] for shader in shaders for name in ("Base Color", "Emission Color")]:
            color.default_value = (*srgb_to_linear(np.clip(color.default_value[:3], 0.0, 1.0)), 1.0)
    if not head.startswith(b"Kaydara FBX Binary"):
        return  # the parser does not support text files
    from io_scene_fbx import parse_fbx

    try:
        root, _ = parse_fbx.parse(os.fspath(path))
    except Exception as error:  # the parser supports fewer files than the importer
        print(f"cannot read the specular reflection and opacity of FBX materials: {error!r}")
        return
    objects = [element for part in root.elems if part.id == b"Objects" for element in part.elems]
    elements = [element for element in objects if element.id == b"Material"]
    names = [element.props[1].split(b"\0")[0].decode("utf-8", "replace") for element in elements]
    for element, name in zip(elements, names, strict=True):
        material = bpy.data.materials.get(name)
        # Blender renames materials with the same name, so they cannot be identified
        if material is None or names.count(name) > 1:
            continue
        parts = {part.id: part for part in element.elems}
        rows = [row.props for row in parts[b"Properties70"].elems] if b"Properties70" in parts else []
        values = {row[0]: row[4:] for row in rows if len(row) > 4}
        is_lambert = b"ShadingModel" in parts and parts[b"ShadingModel"].props[0].lower() == b"lambert"
        is_dark = any(not any(values.get(key, (1,))) for key in (b"SpecularFactor", b"SpecularColor"))
        opacity = _opacity(values)
        for shader in principled_shaders(material):
            if is_lambert or is_dark:
                shader.inputs["Specular IOR Level"].default_value = 0.0
            if 0 < opacity < 1:
                shader.inputs["Alpha"].default_value = opacity


def _opacity(values: dict[bytes, list[float]]) -> float:
    """Return the opacity of an FBX material according to the rules of Blender's Python importer and three.js."""
    opacity = 1 - values.get(b"TransparencyFactor", [0.0])[0]
    if opacity in (0, 1):
        opacity = values.get(b"Opacity", [1 - values.get(b"TransparentColor", [0.0])[0]])[0]
    return opacity


def _rescale_byte_colors() -> None:
    """Divide vertex colors in the range [0, 255] by 255, because Blender's importer expects the range [0, 1]."""
    layers = [mesh.color_attributes[0].data for mesh in bpy.data.meshes if mesh.color_attributes]
    colors = [read_floats(layer, "color", 4) for layer in layers]
    if max((float(values[:, :3].max(initial=0)) for values in colors), default=0) <= srgb_to_linear(2.0):
        return
    for layer, values in zip(layers, colors, strict=True):
        values[:, :3] = srgb_to_linear(linear_to_srgb(values[:, :3].clip(0)) / 255)
        layer.foreach_set("color", values.reshape(-1))


def _is_gray(material: bpy.types.Material) -> bool:
    colors = [shader.inputs["Base Color"] for shader in principled_shaders(material)]
    return any(not c.is_linked and max(c.default_value[:3]) - min(c.default_value[:3]) < 1e-3 for c in colors)


def _link_vertex_colors(material: bpy.types.Material, attribute: str) -> None:
    node = material.node_tree.nodes.new("ShaderNodeVertexColor")
    node.layer_name = attribute
    for shader in principled_shaders(material):
        if not shader.inputs["Base Color"].is_linked:
            material.node_tree.links.new(node.outputs["Color"], shader.inputs["Base Color"])


def load_unsupported_images() -> None:
    """Load images in formats that Blender does not support (PPM, PCX, AVIF), and GIFs that Blender reads as movies."""
    for image in [image for image in bpy.data.images if image.filepath and image.size[0] == 0]:
        try:
            with Image.open(bpy.path.abspath(image.filepath)) as first:
                pixels = np.asarray(first.convert("RGBA"), dtype=np.float32)[::-1] / 255
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # counted as a missing texture
        height, width = pixels.shape[:2]
        loaded = bpy.data.images.new(image.name, width, height, alpha=True)
        loaded.pixels.foreach_set(pixels.ravel())
        loaded.pack()
        loaded.alpha_mode = image.alpha_mode
        image.user_remap(loaded)
        bpy.data.images.remove(image)


def is_opaque(material: bpy.types.Material | None) -> bool:
    """Return whether a material is fully opaque."""
    return material is None or all(
        not alpha.is_linked and alpha.default_value >= 1 for alpha in alpha_inputs(material)
    )


def alpha_inputs(material: bpy.types.Material) -> list[bpy.types.NodeSocket]:
    """Return the sockets that control the opacity of a material."""
    tree = material.node_tree
    mixes = [node.inputs[0] for node in tree.nodes if node.type == "MIX_SHADER"] if tree else []
    unlit = [fac for fac in mixes if not (fac.is_linked and fac.links[0].from_node.type == "LIGHT_PATH")]
    return [shader.inputs["Alpha"] for shader in principled_shaders(material)] or unlit


def apply_texture(image_path: Path) -> None:
    """Apply a texture to all meshes, using the texture coordinates of each mesh."""
    material, shader = _new_material("texture")
    node = material.node_tree.nodes.new("ShaderNodeTexImage")
    node.image = bpy.data.images.load(os.fspath(image_path.absolute()))
    material.node_tree.links.new(node.outputs["Color"], shader.inputs["Base Color"])
    for mesh in bpy.data.meshes:
        mesh.materials.clear()
        mesh.materials.append(material)


def _new_material(name: str) -> tuple[bpy.types.Material, bpy.types.Node]:
    """Return a new matte material and its Principled BSDF node."""
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    shader = material.node_tree.nodes["Principled BSDF"]
    shader.inputs["Specular IOR Level"].default_value = 0.0
    shader.inputs["Roughness"].default_value = 1.0
    return material, shader
