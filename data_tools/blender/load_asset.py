"""Import of a mesh file into an empty scene, and normalization of the scene. The module requires ``bpy``."""

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
from data_tools.blender import faces, gltf, materials, textures
from data_tools.blender.attributes import read_triangles, transform
from data_tools.quality.measures import MeshMeasures
from lrm_pl.conventions import Normalization

#: Maximum number of triangles per object.
MAX_TRIANGLES = 20_000_000

#: Minimum number of float32 positions across an object. With fewer positions, the surface would have visible steps.
MIN_STEPS = 4096

_SURFACE_TYPES = {"MESH", "CURVE", "SURFACE", "FONT", "META"}


def load_asset(
    path: Path, normalize: Normalization, root: Path | None = None, up: UpAxis = ""
) -> tuple[npt.NDArray[np.float64], MeshMeasures]:
    """Reset Blender, import one file, and prepare the scene with ``prepare_scene``.

    Args:
        path: Path of the mesh file.
        normalize: Normalization, "sphere" or "cube".
        root: Folder that must contain all files to which the mesh refers. If None, the folder of the mesh is used.
        up: Up axis of an OBJ or PLY file. If "", it is y.

    Returns:
        The return values of ``prepare_scene``.

    Raises:
        AssetError: The file cannot be imported, has no usable mesh, or refers to files outside ``root``.
    """
    root = (root or path.parent).absolute()
    bpy.ops.wm.read_factory_settings(use_empty=True)
    suffix = path.suffix.lower()
    if (target := _target_with_its_files(path, suffix)) is not None:
        path, root = target, root if target.is_relative_to(root) else target.parent
    missing, texture, undefined, clamped = list[str](), "", list[str](), set[str]()
    with tempfile.TemporaryDirectory() as scratch:
        readable = path
        if suffix == ".obj":
            content = path.read_bytes()
            mtl_files, missing = obj_materials.find_mtl_files(path, content)
            _reject_files_outside(root, path.parent, map(str, mtl_files))
            undefined = [] if missing else obj_materials.find_undefined_materials(content, mtl_files)
            clamped = obj_materials.clamped_textures(mtl_files)
            readable = materials.prepare_obj(content, mtl_files, Path(scratch))
        elif suffix == ".ply":
            readable, texture, lost = ply.prepare_ply(path, Path(scratch))
            missing += lost
            _reject_files_outside(root, path.parent, [texture] if texture else [])
        elif suffix in gltf.GLTF_SUFFIXES:
            _reject_files_outside(root, path.parent, gltf.external_uris(path))
            readable = gltf.prepare_gltf(path, Path(scratch))
        _import(readable, up or "y")
    if suffix == ".obj":
        _reject_lost_faces(content)
    if texture:
        materials.apply_texture(path.parent / texture)
    textures.find_textures(path.parent.absolute())
    if suffix == ".fbx":
        materials.correct_fbx(path)
    if suffix not in gltf.GLTF_SUFFIXES:
        if not materials.apply_vertex_colors():
            missing += undefined
        textures.clamp_textures(clamped)
    images = [bpy.path.abspath(image.filepath) for image in bpy.data.images if image.filepath]
    _reject_files_outside(root, Path.cwd(), images)
    materials.load_unsupported_images()
    if suffix not in gltf.GLTF_SUFFIXES:
        textures.ignore_color_alpha()
        textures.link_opacity_masks()
        textures.remove_bump_maps()
    return prepare_scene(normalize, missing)


def _reject_lost_faces(obj: bytes) -> None:
    """Reject an OBJ if the importer removed faces with invalid vertex indices. Removed duplicates are allowed."""
    if sum(len(mesh.polygons) for mesh in bpy.data.meshes) >= obj.count(b"\nf "):
        return
    if face := obj_materials.find_invalid_face(obj):
        raise AssetError(
            expected="valid vertex indices",
            found=f"the face {_printable(face)!r}",
            remedy="export or download the mesh again",
        )


def _target_with_its_files(path: Path, suffix: str) -> Path | None:
    """Return the target of a symbolic link to a mesh if the files to which the mesh refers exist only at the target."""
    target = path.resolve()
    if not path.is_symlink() or target.suffix.lower() != suffix:
        return None
    return target if _lacks_files(path, suffix) and not _lacks_files(target, suffix) else None


def _lacks_files(path: Path, suffix: str) -> bool:
    """Return whether a file to which a mesh refers is missing."""
    if suffix == ".obj":
        return bool(obj_materials.find_mtl_files(path, path.read_bytes())[1])
    uris = gltf.external_uris(path) if suffix in gltf.GLTF_SUFFIXES else []
    return any(not (path.parent / uri.replace("\\", "/")).exists() for uri in uris)


def _reject_files_outside(root: Path, folder: Path, files: Iterable[str]) -> None:
    """Reject references of untrusted meshes to files outside a folder.

    Args:
        root: Folder that must contain the files.
        folder: Base folder of relative paths.
        files: Paths of the files. They may contain backslashes and the prefix ``file:``, which importers accept.
    """
    for file in files:
        for written in {file, file.replace("\\", "/"), re.sub("^file:/*", "/", file)}:
            # symbolic links are allowed and not resolved
            path = Path(os.path.normpath(folder.absolute() / written))
            is_inside = path.is_relative_to(root) or path.is_relative_to(root.resolve())
            if os.path.exists(path) and not is_inside:
                raise AssetError(
                    expected=f"references to files in {root}",
                    found=f"a reference to {_printable(str(path))}",
                    remedy="move the file to this folder",
                )


def _printable(name: str) -> str:
    """Return a name in which bytes that are not valid UTF-8 are escaped."""
    return name.encode(errors="backslashreplace").decode()


def prepare_scene(
    normalize: Normalization, lost: Sequence[str] = ()
) -> tuple[npt.NDArray[np.float64], MeshMeasures]:
    """Prepare an imported scene for rendering.

    Cameras, lights and hidden objects are excluded from rendering, the first frame is selected, the materials are
    corrected, and the scene is normalized.

    Args:
        normalize: Normalization, "sphere" or "cube".
        lost: Names of missing files and materials, which are counted as missing textures.

    Returns:
        Half side lengths of the bounding box, shape (3,), and measures of the scene. The box is centered at the origin.

    Raises:
        AssetError: There are no visible faces, or their positions, size or number are outside the limits.
    """
    # Hidden objects are not removed, because the transforms of their children depend on them.
    objects = list(bpy.context.view_layer.objects)  # excludes the inactive scenes of glTF files
    for obj in objects:
        obj.hide_render = _is_hidden(obj)
    animated = _show_first_frame()
    bpy.context.view_layer.update()  # updates world matrices
    for obj in objects:
        if sum(map(bool, obj.matrix_world.to_scale())) < 2:  # the area is 0 if two scales are 0
            obj.hide_render = True
    faces.flip_opposed_normals()
    doubled = faces.separate_duplicate_faces()
    one_sided = faces.cull_back_faces()
    shown = [obj for obj in objects if not obj.hide_render and obj.type in _SURFACE_TYPES]
    unused = _images_of(set(bpy.data.objects) - set(shown)) - _images_of(shown)
    # Reading the size makes Blender load the image.
    images = [
        image
        for image in bpy.data.images
        if image not in unused and (image.source not in ("GENERATED", "VIEWER") or image.packed_file)
    ]
    missing = [image.filepath or image.name for image in images if image.size[0] == 0]
    missing += [f"node {node.name}" for node in _texture_nodes(shown) if node.image is None]
    textures.assign_color_spaces()
    for name in [*missing, *lost]:
        print(f"missing texture: {_printable(name)}")
    extent, size, triangles, degenerate = _normalize(normalize)
    type_counts = Counter(obj.type for obj in objects)
    used = {slot.material for obj in shown for slot in obj.material_slots if slot.material}
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
        hidden=sum(obj.hide_render and obj.type in _SURFACE_TYPES for obj in objects),
        cameras=type_counts["CAMERA"],
        lights=type_counts["LIGHT"],
    )


def _images_of(objects: Iterable[bpy.types.Object]) -> set[bpy.types.Image]:
    """Return the images that the materials of objects use."""
    return {node.image for node in _texture_nodes(objects) if node.image}


def _texture_nodes(objects: Iterable[bpy.types.Object]) -> list[bpy.types.ShaderNodeTexImage]:
    """Return the texture nodes in the materials of objects."""
    materials = {slot.material for obj in objects for slot in obj.material_slots if slot.material}
    trees = [material.node_tree for material in materials if material.node_tree]
    return [node for tree in trees for node in tree.nodes if node.type == "TEX_IMAGE"]


def _is_hidden(obj: bpy.types.Object) -> bool:
    """Return whether the mesh file specifies that an object is not visible."""
    if obj.type in {"CAMERA", "LIGHT", "LIGHT_PROBE"}:
        return True
    if obj.hide_render or obj.hide_viewport or obj.hide_get() or not obj.visible_camera:
        return True
    materials = [slot.material for slot in obj.material_slots]
    return bool(materials) and all(map(_is_clear, materials))


def _is_clear(material: bpy.types.Material | None) -> bool:
    """Return whether the alpha of a material is 0 and not controlled by a texture."""
    if material is None:
        return False
    found = materials.alpha_inputs(material)
    return bool(found) and not any(alpha.is_linked or alpha.default_value for alpha in found)


def _is_colored(used: Iterable[bpy.types.Material]) -> bool:
    """Return whether materials have a texture, vertex colors or more than one color."""
    colors = set()
    for material in used:
        shown = [
            [shader.inputs["Base Color"], *([shader.inputs["Emission Color"]] if _glows(shader) else [])]
            for shader in materials.principled_shaders(material)
        ]
        if not shown and material.node_tree:  # an unlit material
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
    """Set the scene to the first frame of all animations, and return whether there are any animations."""
    starts = [float(action.frame_range[0]) for action in bpy.data.actions]
    if starts:
        first = math.floor(min(starts))
        bpy.context.scene.frame_set(first, subframe=min(starts) - first)
    return bool(starts)


def _import(path: Path, up: str) -> None:
    axes = {"up_axis": up.upper(), "forward_axis": "Y" if up == "z" else "NEGATIVE_Z"}
    importers: dict[str, Callable[[str], set[str]]] = {
        ".obj": lambda file: bpy.ops.wm.obj_import(filepath=file, **axes),
        ".ply": lambda file: bpy.ops.wm.ply_import(filepath=file, **axes),
        ".fbx": lambda file: bpy.ops.wm.fbx_import(filepath=file),
    }
    try:
        outcome = importers.get(path.suffix.lower(), gltf.import_gltf)(str(path))
    except AssetError:
        raise
    except Exception as error:  # importers can raise any exception
        # The reason is the last line of the traceback that is not the location in Blender.
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Location:" not in line]
        reason = lines[-1] if lines else ""
        raise AssetError(
            f"import failed: {type(error).__name__}: {reason}",
            remedy="remove the extension with gltf-transform (npm @gltf-transform/cli)"
            if "Extension" in reason
            else "",
        ) from error
    if "FINISHED" not in outcome:
        raise AssetError("import failed: Blender reported no reason")


def _normalize(normalize: Normalization) -> tuple[npt.NDArray[np.float64], float, int, float]:
    """Center the bounding box at the origin and scale the scene, by adding a parent to all root objects.

    Returns:
        (3,) half side lengths of the box, longest side of the box before scaling, number of triangles, and fraction of
        degenerate triangles.
    """
    meshes = list(world_meshes())
    if not meshes:
        raise AssetError(expected="mesh faces", found="none")
    if not all(np.isfinite(points).all() for points, _ in meshes):
        raise AssetError(expected="finite vertex positions", found="NaN or infinity")
    flat = [_is_flat(points, corners) for points, corners in meshes]
    # degenerate faces, for example between triangle strips, are not visible
    vertices = np.concatenate(
        [points[np.unique(corners[~mask])] for (points, corners), mask in zip(meshes, flat, strict=True)]
    )
    if not len(vertices):
        raise AssetError(expected="faces with a nonzero area", found="none")
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    center = (low + high) / 2
    distances = np.linalg.norm(vertices - center, axis=1) if normalize == "sphere" else (high - low) / 2
    size = float(distances.max())
    if not 1e-12 < size < 1e12:
        raise AssetError(expected="an object of finite, nonzero size", found=f"{size:.3g} units")
    distance = max(float(np.abs(center).max()), 1e-300)
    steps = size / distance * 2**24
    if steps < MIN_STEPS:
        raise AssetError(
            expected=f"at least {MIN_STEPS} float32 positions across the object",
            found=f"{steps:.0f}, because the object is far from the origin ({distance / size:.3g} times its size)",
            remedy="move the object to the origin, and export the mesh again",
        )
    triangles = sum(len(corners) for _, corners in meshes)
    if triangles > MAX_TRIANGLES:
        raise AssetError(expected=f"at most {MAX_TRIANGLES} triangles", found=triangles)
    root = bpy.data.objects.new("normalize", None)
    for obj in bpy.context.scene.objects:
        if obj.parent is None:
            obj.parent = root
    bpy.context.scene.collection.objects.link(root)
    root.matrix_world = mathutils.Matrix.Scale(1 / size, 4) @ mathutils.Matrix.Translation(-center)
    bpy.context.view_layer.update()
    degenerate = sum(int(mask.sum()) for mask in flat) / triangles
    return (high - low) / 2 / size, float((high - low).max()), triangles, degenerate


def _is_flat(points: npt.NDArray[np.float64], corners: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Return a mask of triangles whose area is negligible compared to the square of the longest side."""
    a, b, c = (points[corners[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    sides = [((b - a) ** 2).sum(axis=1), ((c - b) ** 2).sum(axis=1), ((a - c) ** 2).sum(axis=1)]
    return np.asarray(area <= 1e-9 * np.maximum.reduce(sides))


def world_meshes() -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]]:
    """Yield (positions, triangles) for each visible object, after modifiers and instances are applied.

    Positions are world coordinates with shape (n, 3). Triangles are vertex indices with shape (m, 3), in
    counterclockwise order as seen from the front side.
    """
    depsgraph = bpy.context.evaluated_depsgraph_get()
    for instance in depsgraph.object_instances:
        obj = instance.object
        if obj.original.hide_render or obj.type not in _SURFACE_TYPES:
            continue
        mesh = obj.to_mesh()
        if mesh is not None and len(mesh.polygons):
            points, corners, slots = read_triangles(mesh)
            clear = [_is_clear(slot.material) for slot in obj.material_slots]
            if any(clear):
                corners = corners[~np.array(clear)[slots.clip(0, len(clear) - 1)]]
            matrix = np.array(instance.matrix_world, dtype=np.float64)
            if np.linalg.det(matrix[:3, :3]) < 0:
                corners = corners[:, ::-1]  # mirroring reverses the corner order
            if len(corners):
                used = np.zeros(len(points), dtype=bool)
                used[corners] = True  # scans and CAD files can contain vertices without faces
                yield transform(points[used], matrix), (np.cumsum(used, dtype=np.int32) - 1)[corners]
        obj.to_mesh_clear()
