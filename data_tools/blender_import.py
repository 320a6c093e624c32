"""Blender side: load one mesh file into an empty scene and scale it into the sphere or cube. Needs bpy."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

import bpy
import mathutils
import numpy as np
import numpy.typing as npt

from data_tools.criteria import MeshMeasures
from lrm_pl.conventions import Normalisation

#: More than this is refused: it would take the memory and the time of thousands of objects.
MAX_TRIANGLES = 20_000_000

_WITH_FACES = {"MESH", "CURVE", "SURFACE", "FONT", "META"}


class AssetError(ValueError):
    """One asset cannot be rendered; the message is its reason in ``failures.jsonl``."""


def load_asset(
    path: Path, normalise: Normalisation, root: Path | None = None
) -> tuple[npt.NDArray[np.float64], MeshMeasures]:
    """Empty Blender, import one file and make it an object as ``prepare`` does.

    Args:
        path: The file.
        normalise: How it is scaled.
        root: The only folder that its pictures may lie in; the file's own unless given.

    Raises:
        AssetError: The file cannot be imported, holds no usable mesh, or uses pictures from elsewhere.
    """
    root = (root or path.parent).absolute()
    bpy.ops.wm.read_factory_settings(use_empty=True)
    if path.suffix.lower() == ".gltf":
        _refuse_files_outside(root, _files_of_gltf(path))
    _import(path)
    pictures = [image for image in bpy.data.images if image.source == "FILE" and not image.packed_file]
    _refuse_files_outside(root, [bpy.path.abspath(image.filepath) for image in pictures if image.filepath])
    return prepare(normalise)


def _files_of_gltf(path: Path) -> list[str]:
    """List the files that a .gltf names."""
    try:
        record = json.loads(path.read_bytes())
        uris = [str(entry.get("uri", "")) for kind in ("buffers", "images") for entry in record.get(kind, ())]
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise AssetError(f"cannot be imported: expected JSON, found: {error}") from error
    return [str(path.parent / unquote(uri)) for uri in uris if uri and not uri.startswith("data:")]


def _refuse_files_outside(root: Path, files: Iterable[str]) -> None:
    """Keep a stranger's mesh from showing what else is on this machine."""
    for file in files:
        place = Path(os.path.normpath(file))  # links are the user's own
        if place.exists() and not any(place.is_relative_to(folder) for folder in (root, root.resolve())):
            raise AssetError(f"expected its files in {root}, found that it uses {place}; put it there")


def prepare(normalise: Normalisation) -> tuple[npt.NDArray[np.float64], MeshMeasures]:
    """Leave out of the scene what is not the object, and normalise it.

    Left out are cameras, lights, and what the file hides; of an animation the first frame is shown.

    Returns:
        (3,) half sides of the bounding box, whose centre is the origin now; and what the scene holds.

    Raises:
        AssetError: There is no usable mesh.
    """
    # None of these is removed: what hangs under it would lose its place.
    for thing in bpy.data.objects:
        thing.hide_render = _is_hidden(thing)
    animated = _show_first_frame()
    _show_vertex_colours()
    # Asking for the size makes Blender load the picture.
    pictures = [image for image in bpy.data.images if image.source == "FILE"]
    missing = [image for image in pictures if image.size[0] == 0]
    for image in missing:
        print(f"missing texture: {image.filepath or image.name}")
    extent, size, triangles, degenerate = _normalise(normalise)
    kinds = Counter(thing.type for thing in bpy.data.objects)
    shown = [thing for thing in bpy.data.objects if not thing.hide_render and thing.type in _WITH_FACES]
    materials = {slot.material for thing in shown for slot in thing.material_slots if slot.material}
    return extent, MeshMeasures(
        triangles=triangles,
        degenerate=degenerate,
        size=size,
        thinness=float(extent.min() / extent.max()),
        materials=len(materials),
        coloured=_is_coloured(materials),
        textures=len(pictures),
        missing_textures=len(missing),
        animated=animated,
        hidden=sum(thing.hide_render and thing.type in _WITH_FACES for thing in bpy.data.objects),
        cameras=kinds["CAMERA"],
        lights=kinds["LIGHT"],
    )


def _is_hidden(thing: bpy.types.Object) -> bool:
    """Say whether an object is no part of what the file shows."""
    if thing.type in {"CAMERA", "LIGHT", "LIGHT_PROBE"}:
        return True
    if thing.hide_render or thing.hide_viewport or thing.hide_get() or not thing.visible_camera:
        return True
    materials = [slot.material for slot in thing.material_slots if slot.material]
    return bool(materials) and len(materials) == len(thing.material_slots) and all(map(_is_clear, materials))


def _is_clear(material: bpy.types.Material) -> bool:
    """Say whether nothing of a material can be seen: its alpha is the number 0."""
    shaders = _shaders(material)
    return bool(shaders) and all(
        not shader.inputs["Alpha"].is_linked and shader.inputs["Alpha"].default_value == 0
        for shader in shaders
    )


def _is_coloured(materials: Iterable[bpy.types.Material]) -> bool:
    """Say whether a surface has a texture, colours at its vertices, or a colour that another one has not."""
    colours = set()
    for material in materials:
        for shader in _shaders(material):
            if shader.inputs["Base Color"].is_linked:
                return True
            colours.add(tuple(round(float(x), 3) for x in shader.inputs["Base Color"].default_value[:3]))
    return len(colours) > 1


def _shaders(material: bpy.types.Material) -> list[bpy.types.Node]:
    tree = material.node_tree
    return [node for node in tree.nodes if node.type == "BSDF_PRINCIPLED"] if tree else []


def _show_first_frame() -> bool:
    """Go to the first frame of all animations; say whether there is one."""
    starts = [float(action.frame_range[0]) for action in bpy.data.actions]
    if starts:
        first = math.floor(min(starts))
        bpy.context.scene.frame_set(first, subframe=min(starts) - first)
    return bool(starts)


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


def _normalise(normalise: Normalisation) -> tuple[npt.NDArray[np.float64], float, int, float]:
    """Move the bounding box's centre to the origin and scale, by hanging every root under one empty.

    Returns:
        (3,) half sides of the box; its longest side before, in the file's units; number of triangles; share of them
        without an area.
    """
    parts = list(world_meshes())
    if not parts:
        raise AssetError("is empty: expected mesh faces, found none")
    vertices = np.concatenate([points for points, _ in parts])
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
    triangles = sum(len(corners) for _, corners in parts)
    if triangles > MAX_TRIANGLES:
        raise AssetError(f"is huge: expected at most {MAX_TRIANGLES} triangles, found {triangles}")
    flat = sum(_count_flat(points, corners) for points, corners in parts)
    root = bpy.data.objects.new("normalise", None)
    for thing in bpy.context.scene.objects:
        if thing.parent is None:
            thing.parent = root
    bpy.context.scene.collection.objects.link(root)
    root.matrix_world = mathutils.Matrix.Scale(1 / size, 4) @ mathutils.Matrix.Translation(-centre)
    bpy.context.view_layer.update()
    return (high - low) / 2 / size, float((high - low).max()), triangles, flat / max(1, triangles)


def _count_flat(points: npt.NDArray[np.float64], corners: npt.NDArray[np.int32]) -> int:
    """Count triangles (n, 3) whose area is nothing beside their longest side squared."""
    a, b, c = (points[corners[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    sides = [((b - a) ** 2).sum(axis=1), ((c - b) ** 2).sum(axis=1), ((a - c) ** 2).sum(axis=1)]
    return int((area <= 1e-9 * np.maximum.reduce(sides)).sum())


def world_meshes() -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]]:
    """Yield (n, 3) world positions and (m, 3) triangles of every visible object, modifiers and instances included."""
    depsgraph = bpy.context.evaluated_depsgraph_get()
    for instance in depsgraph.object_instances:
        thing = instance.object
        if thing.original.hide_render or thing.type not in _WITH_FACES:
            continue
        mesh = thing.to_mesh()
        if mesh is not None and len(mesh.polygons):
            flat = np.empty(len(mesh.vertices) * 3, dtype=np.float32)
            mesh.vertices.foreach_get("co", flat)
            mesh.calc_loop_triangles()
            corners = np.empty(len(mesh.loop_triangles) * 3, dtype=np.int32)
            mesh.loop_triangles.foreach_get("vertices", corners)
            matrix = np.array(instance.matrix_world, dtype=np.float64)
            points = flat.reshape(-1, 3).astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
            yield points, corners.reshape(-1, 3)
        thing.to_mesh_clear()
