"""Blender side: an OBJ of the demo library to a GLB that looks right under uniform light. Needs bpy."""

import os
from pathlib import Path

import bpy
from PIL import Image

from lrm_pl.color_spaces import srgb_to_linear

# isort: split
import bmesh  # exists only once bpy is loaded

MAX_TEXTURE_SIDE = 512


def convert_to_glb(obj: Path, glb: Path, scratch: Path) -> None:
    """Import an OBJ, make its materials matt, shrink its textures, export a GLB; always the same bytes.

    Args:
        obj: The mesh; its MTL and textures lie beside it.
        glb: The file to write.
        scratch: Empty folder for shrunk textures.
    """
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.wm.obj_import(filepath=os.fspath(obj), use_split_objects=False)
    for mesh in bpy.data.meshes:
        _drop_doubled_faces(mesh)
    for material in sorted(bpy.data.materials, key=lambda material: material.name):
        _make_matt(material, scratch)
    if not any(node.type == "TEX_IMAGE" for m in bpy.data.materials for node in m.node_tree.nodes):
        for mesh in bpy.data.meshes:
            while mesh.uv_layers:  # nothing to be laid on the surface
                mesh.uv_layers.remove(mesh.uv_layers[0])
    bpy.ops.export_scene.gltf(
        filepath=os.fspath(glb),
        export_format="GLB",
        export_image_format="AUTO",
        export_animations=False,
        export_extras=False,
        export_yup=True,
    )


def _drop_doubled_faces(mesh: bpy.types.Mesh) -> None:
    """Keep one of several faces in one place: the library doubles some, on which a ray tracer speckles."""
    editable = bmesh.new()
    editable.from_mesh(mesh)
    seen: set[frozenset[tuple[float, ...]]] = set()
    doubled = []
    for face in editable.faces:
        corners = frozenset(tuple(round(x, 5) for x in vertex.co) for vertex in face.verts)
        if corners in seen:
            doubled.append(face)
        seen.add(corners)
    bmesh.ops.delete(editable, geom=doubled, context="FACES")
    editable.to_mesh(mesh)
    editable.free()


def _make_matt(material: bpy.types.Material, scratch: Path) -> None:
    """Keep a material's color or texture, drop its gloss: a white world would veil it."""
    tree = material.node_tree
    shader = next(node for node in tree.nodes if node.type == "BSDF_PRINCIPLED")
    # the library's own viewer shows Kd as sRGB; Blender took it for linear light, which would bleach it
    color = (*(srgb_to_linear(x) for x in shader.inputs["Base Color"].default_value[:3]), 1.0)
    texture = next(
        (link.from_node.image for link in tree.links if link.to_socket == shader.inputs["Base Color"]), None
    )
    alpha_is_textured = shader.inputs["Alpha"].is_linked
    alpha = float(shader.inputs["Alpha"].default_value)
    tree.nodes.clear()
    output = tree.nodes.new("ShaderNodeOutputMaterial")
    matt = tree.nodes.new("ShaderNodeBsdfPrincipled")
    tree.links.new(matt.outputs["BSDF"], output.inputs["Surface"])
    matt.inputs["Base Color"].default_value = color
    matt.inputs["Alpha"].default_value = alpha
    matt.inputs["Metallic"].default_value = 0.0
    matt.inputs["Roughness"].default_value = 1.0
    matt.inputs["Specular IOR Level"].default_value = 0.0
    if texture is not None:
        node = tree.nodes.new("ShaderNodeTexImage")
        node.image = bpy.data.images.load(
            os.fspath(
                _shrink(Path(bpy.path.abspath(texture.filepath)), scratch, keep_alpha=alpha_is_textured)
            ),
            check_existing=True,
        )
        tree.links.new(node.outputs["Color"], matt.inputs["Base Color"])
        if alpha_is_textured:
            tree.links.new(node.outputs["Alpha"], matt.inputs["Alpha"])


def _shrink(texture: Path, scratch: Path, *, keep_alpha: bool) -> Path:
    """Write a copy of a texture of at most 512 pixels a side: JPEG, or PNG where its alpha matters."""
    with Image.open(texture) as image:
        small = image.convert("RGBA" if keep_alpha else "RGB")
    small.thumbnail((MAX_TEXTURE_SIDE, MAX_TEXTURE_SIDE), Image.Resampling.LANCZOS)
    path = scratch / (texture.stem + (".png" if keep_alpha else ".jpg"))
    if keep_alpha:
        small.save(path, optimize=True)
    else:
        small.save(path, quality=85, subsampling=0)
    return path
