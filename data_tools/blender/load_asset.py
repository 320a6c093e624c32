"""Blender side: load one mesh file into an empty scene and scale it into the sphere or cube. Needs bpy."""

import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import bpy
import mathutils
import numpy as np
import numpy.typing as npt

from data_tools.assets import obj_materials, ply
from data_tools.assets.asset_list import AssetError, UpAxis
from data_tools.blender import gltf, materials, textures
from data_tools.quality.measures import MeshMeasures
from lrm_pl.conventions import Normalization

#: More than this is refused: it would take the memory and the time of thousands of objects.
MAX_TRIANGLES = 20_000_000

#: Positions that float32 must tell apart across an object: fewer make steps of its surface.
MIN_STEPS = 4096

_WITH_FACES = {"MESH", "CURVE", "SURFACE", "FONT", "META"}


def load_asset(
    path: Path, normalize: Normalization, root: Path | None = None, up: UpAxis = ""
) -> tuple[npt.NDArray[np.float64], MeshMeasures]:
    """Empty Blender, import one file and make it an object as ``prepare_scene`` does.

    Args:
        path: The file.
        normalize: How it is scaled.
        root: The only folder that its files may lie in; the file's own unless given.
        up: The axis that points up in an OBJ or PLY, which do not say; "": y.

    Raises:
        AssetError: The file cannot be imported, holds no usable mesh, or uses files from elsewhere.
    """
    root = (root or path.parent).absolute()
    bpy.ops.wm.read_factory_settings(use_empty=True)
    kind = path.suffix.lower()
    if (target := _target_with_its_files(path, kind)) is not None:
        path, root = target, root if target.is_relative_to(root) else target.parent
    missing, texture, undefined, clamped = list[str](), "", list[str](), set[str]()
    with tempfile.TemporaryDirectory() as scratch:
        readable = path
        if kind == ".obj":
            content = path.read_bytes()
            mtl_files, missing = obj_materials.find_mtl_files(path, content)
            _refuse_files_outside(root, path.parent, map(str, mtl_files))
            undefined = [] if missing else obj_materials.find_undefined_materials(content, mtl_files)
            clamped = obj_materials.clamped_textures(mtl_files)
            readable = materials.prepare_obj(path, content, mtl_files, Path(scratch))
        elif kind == ".ply":
            readable, texture, lost = ply.prepare_ply(path, Path(scratch))
            missing += lost
            _refuse_files_outside(root, path.parent, [texture] if texture else [])
        elif kind in gltf.GLTF_SUFFIXES:
            _refuse_files_outside(root, path.parent, gltf.external_uris(path))
            readable = gltf.prepare_gltf(path, Path(scratch))
        _import(readable, up or "y")
    if kind == ".obj":
        _refuse_lost_faces(content)
    if texture:
        materials.apply_texture(path.parent / texture)
    textures.find_textures(path.parent.absolute())
    if kind == ".fbx":
        materials.correct_fbx(path)
    if kind not in gltf.GLTF_SUFFIXES:
        has_colors = materials.apply_vertex_colors()
        missing += [] if has_colors else undefined
        textures.clamp_textures(clamped)
    images = [bpy.path.abspath(image.filepath) for image in bpy.data.images if image.filepath]
    _refuse_files_outside(root, Path.cwd(), images)
    materials.load_unsupported_images()
    if kind not in gltf.GLTF_SUFFIXES:
        textures.ignore_color_alpha()
        textures.link_opacity_masks()
        textures.remove_bump_maps()
    return prepare_scene(normalize, missing)


def _refuse_lost_faces(obj: bytes) -> None:
    """Refuse an OBJ of which the importer left a face out; not for one of several in one place."""
    if sum(len(mesh.polygons) for mesh in bpy.data.meshes) >= obj.count(b"\nf "):
        return
    if face := obj_materials.find_invalid_face(obj):
        raise AssetError(
            f"expected faces between its vertices, but found {_printable(face)!r}; export or download it again"
        )


def _target_with_its_files(path: Path, kind: str) -> Path | None:
    """Return what a linked mesh links to, where the files that it names lie beside that and not beside the link."""
    target = path.resolve()
    if not path.is_symlink() or target.suffix.lower() != kind:
        return None
    return target if _lacks_files(path, kind) and not _lacks_files(target, kind) else None


def _lacks_files(path: Path, kind: str) -> bool:
    """Say whether a file that a mesh file names is not beside it."""
    if kind == ".obj":
        return bool(obj_materials.find_mtl_files(path, path.read_bytes())[1])
    external_uris = gltf.external_uris(path) if kind in gltf.GLTF_SUFFIXES else []
    return any(not (path.parent / uri.replace("\\", "/")).exists() for uri in external_uris)


def _refuse_files_outside(root: Path, folder: Path, files: Iterable[str]) -> None:
    """Keep a stranger's mesh from showing what else is on this machine.

    Args:
        root: Where files may lie.
        folder: What relative paths start from.
        files: Paths, however they are written: importers take a backslash for a slash, and ``file:`` away.
    """
    for file in files:
        for written in {file, file.replace("\\", "/"), re.sub("^file:/*", "/", file)}:
            place = Path(os.path.normpath(folder.absolute() / written))  # links are the user's own
            if os.path.exists(place) and not any(
                place.is_relative_to(inside) for inside in (root, root.resolve())
            ):
                raise AssetError(
                    f"expected its files in {root}, but found that it uses {_printable(str(place))}; put it there"
                )


def _printable(name: str) -> str:
    """Return a name that may not be UTF-8 as text that can be printed and listed."""
    return name.encode(errors="backslashreplace").decode()


def prepare_scene(
    normalize: Normalization, lost: Sequence[str] = ()
) -> tuple[npt.NDArray[np.float64], MeshMeasures]:
    """Leave out of the scene what is not the object, and normalize it.

    Left out are cameras, lights, and what the file hides; of an animation the first frame is shown.

    Args:
        normalize: How it is scaled.
        lost: Files that its colors come from, which are not there.

    Returns:
        (3,) half sides of the bounding box, whose center is the origin now; and what the scene holds.

    Raises:
        AssetError: There is no usable mesh.
    """
    # None of these is removed: what hangs under it would lose its place.
    things = list(
        bpy.context.view_layer.objects
    )  # a glTF file may hold other scenes than the one that it shows
    for thing in things:
        thing.hide_render = _is_hidden(thing)
    animated = _show_first_frame()
    bpy.context.view_layer.update()  # evaluates world matrices
    for thing in things:
        if sum(map(bool, thing.matrix_world.to_scale())) < 2:  # a scale of 0 leaves no area
            thing.hide_render = True
    materials.flip_opposed_normals()
    doubled = materials.separate_duplicate_faces()
    one_sided = materials.cull_back_faces()
    shown = [thing for thing in things if not thing.hide_render and thing.type in _WITH_FACES]
    unseen = _images(set(bpy.data.objects) - set(shown)) - _images(shown)
    # Asking for the size makes Blender load the image.
    images = [
        image
        for image in bpy.data.images
        if image not in unseen and (image.source not in ("GENERATED", "VIEWER") or image.packed_file)
    ]
    missing = [image.filepath or image.name for image in images if image.size[0] == 0]
    missing += [f"that of {node.name}" for node in _texture_nodes(shown) if node.image is None]
    textures.assign_color_spaces()
    for name in [*missing, *lost]:
        print(f"missing texture: {_printable(name)}")
    extent, size, triangles, degenerate = _normalize(normalize)
    kinds = Counter(thing.type for thing in things)
    used = {slot.material for thing in shown for slot in thing.material_slots if slot.material}
    return extent, MeshMeasures(
        triangles=triangles,
        degenerate=degenerate,
        doubled=doubled,
        one_sided=one_sided,
        size=size,
        thinness=float(extent.min() / extent.max()),
        materials=len(used),
        colored=_is_colored(used),
        textures=len(images),
        missing_textures=len(missing) + len(lost),
        animated=animated,
        hidden=sum(thing.hide_render and thing.type in _WITH_FACES for thing in things),
        cameras=kinds["CAMERA"],
        lights=kinds["LIGHT"],
    )


def _images(things: Iterable[bpy.types.Object]) -> set[bpy.types.Image]:
    """Return the images of the materials of some objects."""
    return {node.image for node in _texture_nodes(things) if node.image}


def _texture_nodes(things: Iterable[bpy.types.Object]) -> list[bpy.types.ShaderNodeTexImage]:
    """Return the texture nodes of the materials of some objects."""
    materials = {slot.material for thing in things for slot in thing.material_slots if slot.material}
    trees = [material.node_tree for material in materials if material.node_tree]
    return [node for tree in trees for node in tree.nodes if node.type == "TEX_IMAGE"]


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
    found = materials.alpha_inputs(material)
    return bool(found) and not any(alpha.is_linked or alpha.default_value for alpha in found)


def _is_colored(used: Iterable[bpy.types.Material]) -> bool:
    """Say whether a surface has a texture, colors at its vertices, or a color that another one has not."""
    colors = set()
    for material in used:
        shown = [
            [shader.inputs["Base Color"], *([shader.inputs["Emission Color"]] if _glows(shader) else [])]
            for shader in materials.principled_shaders(material)
        ]
        if not shown and material.node_tree:  # unlit
            shown = [[node.inputs["Color"]] for node in material.node_tree.nodes if node.type == "EMISSION"]
        for inputs in shown:
            if any(color.is_linked for color in inputs):
                return True
            colors.add(tuple(round(float(x), 3) for color in inputs for x in color.default_value[:3]))
    return len(colors) > 1


def _glows(shader: bpy.types.Node) -> bool:
    """Return whether a Principled BSDF emits light."""
    color, strength = shader.inputs["Emission Color"], shader.inputs["Emission Strength"]
    shines = strength.is_linked or strength.default_value > 0
    return bool(shines and (color.is_linked or max(color.default_value[:3]) > 0))


def _show_first_frame() -> bool:
    """Go to the first frame of all animations; say whether there is one."""
    starts = [float(action.frame_range[0]) for action in bpy.data.actions]
    if starts:
        first = math.floor(min(starts))
        bpy.context.scene.frame_set(first, subframe=min(starts) - first)
    return bool(starts)


def _import(path: Path, up: str) -> None:
    axes = {"up_axis": up.upper(), "forward_axis": "Y" if up == "z" else "NEGATIVE_Z"}
    importers: dict[str, Callable[[str], set[str]]] = {
        ".glb": gltf.import_gltf,
        ".gltf": gltf.import_gltf,
        ".obj": lambda file: bpy.ops.wm.obj_import(filepath=file, **axes),
        ".ply": lambda file: bpy.ops.wm.ply_import(filepath=file, **axes),
        ".fbx": lambda file: bpy.ops.wm.fbx_import(filepath=file),
    }
    try:
        outcome = importers[path.suffix.lower()](str(path))
    except AssetError:
        raise
    except Exception as error:  # importers are scripts: a broken file may raise anything
        # Of a traceback the last line says why, but for the place in Blender that follows it.
        said = [line for line in str(error).splitlines() if line.strip() and "Location:" not in line] or [""]
        remedy = (
            "; gltf-transform turns it into one without (npm @gltf-transform/cli)"
            if "Extension" in said[-1]
            else ""
        )
        raise AssetError(f"cannot be imported: {type(error).__name__}: {said[-1].strip()}{remedy}") from error
    if "FINISHED" not in outcome:
        raise AssetError("cannot be imported: Blender's importer gave up without a reason")


def _normalize(normalize: Normalization) -> tuple[npt.NDArray[np.float64], float, int, float]:
    """Move the bounding box's center to the origin and scale, by hanging every root under one empty.

    Returns:
        (3,) half sides of the box; its longest side before, in the file's units; number of triangles; share of them
        without an area.
    """
    parts = list(world_meshes())
    if not parts:
        raise AssetError("is empty: expected mesh faces, but found none")
    if not all(np.isfinite(points).all() for points, _ in parts):
        raise AssetError("expected finite vertex positions, but found infinite or undefined ones")
    flat = [_is_flat(points, corners) for points, corners in parts]
    # faces without area, such as those that join triangle strips, are invisible
    vertices = np.concatenate(
        [points[np.unique(corners[~none])] for (points, corners), none in zip(parts, flat, strict=True)]
    )
    if not len(vertices):
        raise AssetError("is empty: expected mesh faces with an area, but found none")
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    center = (low + high) / 2
    size = (
        float(np.linalg.norm(vertices - center, axis=1).max())
        if normalize == "sphere"
        else float((high - low).max()) / 2
    )
    if not 1e-12 < size < 1e12:
        raise AssetError(f"expected an object with a size, but found one of {size:.3g} units")
    steps = size / max(float(np.abs(center).max()), 1e-300) * 2**24
    if steps < MIN_STEPS:
        raise AssetError(
            f"lies {np.abs(center).max() / size:.3g} times its size from the origin, where float32 tells only "
            f"{steps:.0f} positions across it apart: move it to the origin in the program that made it"
        )
    triangles = sum(len(corners) for _, corners in parts)
    if triangles > MAX_TRIANGLES:
        raise AssetError(f"is huge: expected at most {MAX_TRIANGLES} triangles, but found {triangles}")
    root = bpy.data.objects.new("normalize", None)
    for thing in bpy.context.scene.objects:
        if thing.parent is None:
            thing.parent = root
    bpy.context.scene.collection.objects.link(root)
    root.matrix_world = mathutils.Matrix.Scale(1 / size, 4) @ mathutils.Matrix.Translation(-center)
    bpy.context.view_layer.update()
    degenerate = sum(int(none.sum()) for none in flat) / triangles
    return (high - low) / 2 / size, float((high - low).max()), triangles, degenerate


def _is_flat(points: npt.NDArray[np.float64], corners: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Return which triangles (n, 3) have no area relative to their longest side squared."""
    a, b, c = (points[corners[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    sides = [((b - a) ** 2).sum(axis=1), ((c - b) ** 2).sum(axis=1), ((a - c) ** 2).sum(axis=1)]
    return np.asarray(area <= 1e-9 * np.maximum.reduce(sides))


def world_meshes() -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]]:
    """Yield (n, 3) world positions and (m, 3) triangles of every visible object, modifiers and instances included.

    Corners are in counterclockwise order seen from the front of a triangle.
    """
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
            corners = _visible_triangles(thing, mesh, corners.reshape(-1, 3))
            matrix = np.array(instance.matrix_world, dtype=np.float64)
            used = np.zeros(len(mesh.vertices), dtype=bool)
            used[corners] = True  # scans have points, and CAD files lines, that no face uses
            points = flat.reshape(-1, 3)[used].astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
            if np.linalg.det(matrix[:3, :3]) < 0:
                corners = corners[:, ::-1]  # mirroring reverses the order
            if len(corners):
                yield points, (np.cumsum(used, dtype=np.int32) - 1)[corners]
        thing.to_mesh_clear()


def _visible_triangles(
    thing: bpy.types.Object, mesh: bpy.types.Mesh, corners: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Return the triangles (n, 3) of a mesh whose material is not fully transparent."""
    clear = np.array([bool(slot.material) and _is_clear(slot.material) for slot in thing.material_slots])
    if not clear.any():
        return corners
    slots = np.empty(len(corners), dtype=np.int32)
    mesh.loop_triangles.foreach_get("material_index", slots)
    return corners[~clear[slots.clip(0, len(clear) - 1)]]
