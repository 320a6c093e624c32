"""Blender side: load one mesh file into an empty scene and scale it into the sphere or cube. Needs bpy."""

from collections.abc import Iterator
from pathlib import Path

import bpy
import mathutils
import numpy as np
import numpy.typing as npt

from lrm_pl.conventions import Normalisation


class AssetError(ValueError):
    """One asset cannot be rendered; the message is its reason in ``failures.jsonl``."""


def load_asset(path: Path, normalise: Normalisation) -> npt.NDArray[np.float64]:
    """Empty Blender, import one file and normalise it.

    Returns:
        (3,) half sides of the bounding box, whose centre is the origin now.

    Raises:
        AssetError: The file cannot be imported, lacks a texture, or holds no usable mesh.
    """
    bpy.ops.wm.read_factory_settings(use_empty=True)
    _import(path)
    for image in bpy.data.images:
        if image.source == "FILE" and image.size[0] == 0:  # asking for the size makes Blender load it
            raise AssetError(f"expected the texture {image.filepath or image.name}, found no readable image")
    for thing in list(bpy.data.objects):
        if thing.type in {"CAMERA", "LIGHT", "LIGHT_PROBE"}:
            bpy.data.objects.remove(thing)
    _show_vertex_colours()
    return _normalise(normalise)


def _import(path: Path) -> None:
    importers = {
        ".glb": lambda file: bpy.ops.import_scene.gltf(filepath=file, disable_bone_shape=True),
        ".gltf": lambda file: bpy.ops.import_scene.gltf(filepath=file, disable_bone_shape=True),
        ".obj": lambda file: bpy.ops.wm.obj_import(filepath=file),
        ".ply": lambda file: bpy.ops.wm.ply_import(filepath=file),
        ".fbx": lambda file: bpy.ops.wm.fbx_import(filepath=file),
    }
    try:
        outcome = importers[path.suffix.lower()](str(path))
    except Exception as error:  # importers are scripts: a broken file may raise anything
        raise AssetError(f"cannot be imported: {type(error).__name__}: {str(error).strip()}") from error
    if "FINISHED" not in outcome:
        raise AssetError("cannot be imported: Blender's importer gave up without a reason")


def _show_vertex_colours() -> None:
    """Give meshes with colours at their vertices but no material (PLY scans) a matt one that shows them."""
    for mesh in bpy.data.meshes:
        if any(mesh.materials) or not mesh.color_attributes:
            continue
        material = bpy.data.materials.new("vertex colours")
        material.use_nodes = True
        nodes = material.node_tree.nodes
        colour = nodes.new("ShaderNodeVertexColor")
        colour.layer_name = mesh.color_attributes[0].name
        shader = nodes["Principled BSDF"]
        shader.inputs["Specular IOR Level"].default_value = 0.0
        shader.inputs["Roughness"].default_value = 1.0
        material.node_tree.links.new(colour.outputs["Color"], shader.inputs["Base Color"])
        mesh.materials.clear()
        mesh.materials.append(material)


def _normalise(normalise: Normalisation) -> npt.NDArray[np.float64]:
    """Move the bounding box's centre to the origin and scale, by hanging every root under one empty."""
    parts = list(_world_vertices())
    if not parts:
        raise AssetError("is empty: expected mesh faces, found none")
    vertices = np.concatenate(parts)
    if not np.isfinite(vertices).all():
        raise AssetError("expected finite vertex positions, found infinite or undefined ones")
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    centre = (low + high) / 2
    size = (
        float(np.linalg.norm(vertices - centre, axis=1).max())
        if normalise == "sphere"
        else float((high - low).max()) / 2
    )
    if not 1e-12 < size < 1e12:
        raise AssetError(f"expected an object with a size, found one of {size:.3g} units")
    root = bpy.data.objects.new("normalise", None)
    for thing in bpy.context.scene.objects:
        if thing.parent is None:
            thing.parent = root
    bpy.context.scene.collection.objects.link(root)
    root.matrix_world = mathutils.Matrix.Scale(1 / size, 4) @ mathutils.Matrix.Translation(-centre)
    bpy.context.view_layer.update()
    return (high - low) / 2 / size


def _world_vertices() -> Iterator[npt.NDArray[np.float64]]:
    """Yield (n, 3) world positions of every visible object with faces, modifiers and instances included."""
    depsgraph = bpy.context.evaluated_depsgraph_get()
    for instance in depsgraph.object_instances:
        thing = instance.object
        if thing.original.hide_render or thing.type not in {"MESH", "CURVE", "SURFACE", "FONT", "META"}:
            continue
        mesh = thing.to_mesh()
        if mesh is not None and len(mesh.polygons):
            flat = np.empty(len(mesh.vertices) * 3, dtype=np.float32)
            mesh.vertices.foreach_get("co", flat)
            matrix = np.array(instance.matrix_world, dtype=np.float64)
            yield flat.reshape(-1, 3).astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
        thing.to_mesh_clear()
