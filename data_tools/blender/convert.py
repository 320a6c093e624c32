"""Conversion of an OBJ to a GLB with matte materials and small textures. The module requires ``bpy``."""

import os
from pathlib import Path

import bpy
from PIL import Image

from data_tools.blender.materials import principled_shaders
from lrm_pl.color_spaces import srgb_to_linear

# isort: split
import bmesh  # available only after bpy is imported

MAX_TEXTURE_SIDE = 512


def convert_to_glb(obj: Path, glb: Path, scratch: Path) -> None:
    """Convert an OBJ to a GLB with matte materials and resized textures. The output is deterministic.

    Args:
        obj: Path of the OBJ. The MTL files and textures are in the same folder.
        glb: Path of the output file.
        scratch: Empty folder for resized textures.
    """
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.wm.obj_import(filepath=os.fspath(obj), use_split_objects=False)
    for mesh in bpy.data.meshes:
        _remove_duplicate_faces(mesh)
    for material in sorted(bpy.data.materials, key=lambda material: material.name):
        _make_matte(material, scratch)
    if not any(node.type == "TEX_IMAGE" for m in bpy.data.materials for node in m.node_tree.nodes):
        for mesh in bpy.data.meshes:
            while mesh.uv_layers:  # not used, because there are no textures
                mesh.uv_layers.remove(mesh.uv_layers[0])
    bpy.ops.export_scene.gltf(
        filepath=os.fspath(glb),
        export_format="GLB",
        export_image_format="AUTO",
        export_animations=False,
        export_extras=False,
        export_yup=True,
    )


def _remove_duplicate_faces(mesh: bpy.types.Mesh) -> None:
    """Remove duplicate faces, because they cause artifacts in ray tracing."""
    editable = bmesh.new()
    editable.from_mesh(mesh)
    seen: set[frozenset[tuple[float, ...]]] = set()
    duplicates = []
    for face in editable.faces:
        corners = frozenset(tuple(round(x, 5) for x in vertex.co) for vertex in face.verts)
        if corners in seen:
            duplicates.append(face)
        seen.add(corners)
    bmesh.ops.delete(editable, geom=duplicates, context="FACES")
    editable.to_mesh(mesh)
    editable.free()


def _make_matte(material: bpy.types.Material, scratch: Path) -> None:
    """Replace a material with a matte material with the same color, texture and opacity."""
    tree = material.node_tree
    (shader,) = principled_shaders(material)
    # Kd is an sRGB color in these files, but Blender reads it as a linear color
    color = (*srgb_to_linear(shader.inputs["Base Color"].default_value[:3]), 1.0)
    texture = next(
        (link.from_node.image for link in tree.links if link.to_socket == shader.inputs["Base Color"]), None
    )
    alpha_is_textured = shader.inputs["Alpha"].is_linked
    alpha = float(shader.inputs["Alpha"].default_value)
    tree.nodes.clear()
    output = tree.nodes.new("ShaderNodeOutputMaterial")
    matte = tree.nodes.new("ShaderNodeBsdfPrincipled")
    tree.links.new(matte.outputs["BSDF"], output.inputs["Surface"])
    constants = {"Metallic": 0.0, "Roughness": 1.0, "Specular IOR Level": 0.0}
    for name, value in ({"Base Color": color, "Alpha": alpha} | constants).items():
        matte.inputs[name].default_value = value
    if texture is not None:
        node = tree.nodes.new("ShaderNodeTexImage")
        resized = _resize(Path(bpy.path.abspath(texture.filepath)), scratch, keep_alpha=alpha_is_textured)
        node.image = bpy.data.images.load(os.fspath(resized), check_existing=True)
        tree.links.new(node.outputs["Color"], matte.inputs["Base Color"])
        if alpha_is_textured:
            tree.links.new(node.outputs["Alpha"], matte.inputs["Alpha"])


def _resize(texture: Path, scratch: Path, *, keep_alpha: bool) -> Path:
    """Resize a texture to at most ``MAX_TEXTURE_SIDE`` pixels per side and write it to a folder.

    The format is PNG if alpha is kept, otherwise JPEG.
    """
    with Image.open(texture) as image:
        small = image.convert("RGBA" if keep_alpha else "RGB")
    small.thumbnail((MAX_TEXTURE_SIDE, MAX_TEXTURE_SIDE), Image.Resampling.LANCZOS)
    path = scratch / (texture.stem + (".png" if keep_alpha else ".jpg"))
    small.save(path, **({"optimize": True} if keep_alpha else {"quality": 85, "subsampling": 0}))
    return path
