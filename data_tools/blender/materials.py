"""Blender side: what a file means by its materials, where Blender's importers or Cycles take it otherwise. Needs bpy.

``textures``, ``gltf`` and ``ply`` have further rows of this table.

| the file says                                  | Blender                   | here                                    |
|------------------------------------------------|---------------------------|-----------------------------------------|
| MTL ``Kd``                                     | linear light              | sRGB, unless Blender wrote the MTL      |
| MTL ``Tf 1 1 1``, which 3ds Max and Maya write | glass                     | glass only with ``illum`` 4, 6, 7 or 9  |
| MTL ``Ks`` with ``illum`` 0 or 1               | gloss                     | no gloss                                |
| an OBJ face with a vertex that is not there    | without that face         | refused                                 |
| MTL ``illum 2`` without ``Ks``                 | a mirror's gloss          | no gloss                                |
| MTL ``Tr`` without ``d``                       | opaque                    | 1 - ``Tr``, but for ``Tr 1``            |
| MTL ``Ke``                                     | linear light              | sRGB, unless Blender wrote the MTL      |
| MTL ``refl``                                   | metal where it is bright  | no reflection                           |
| FBX colors of materials                        | linear light              | sRGB, unless Blender wrote the FBX      |
| FBX ``TransparencyFactor``, in binary          | opaque                    | transparent                             |
| FBX without highlights, in binary              | gloss                     | no gloss                                |
| ``Kd 0.5``; names in quotes or not in UTF-8    | cyan; gray                | gray of 0.5; as any other name          |
| ``mtllib`` with several names, or a wrong one  | gray                      | each; the MTL of the OBJ's own name     |
| an MTL of the OBJ's name that it does not name | that one                  | not read if the named ones are there    |
| MTL ``map_Ka`` without ``map_Kd``              | no texture                | the texture                             |
| colors at vertices, and a material without one | the material's gray       | the colors; the gray of parts without   |
| normals that point to the back of their face   | black                     | they are turned                         |
| glTF without ``doubleSided``                   | both sides are seen       | back faces are not seen, holes or not   |
| a GIF, PPM, PCX or AVIF as a texture           | magenta                   | the (first) image                     |
| several faces in one place                     | black speckles            | one of them; opaque under transparent   |
| an OBJ whose MTL or material is not there      | gray                      | counted as a missing texture            |
| colors at vertices in 0 to 255, not 0 to 1     | white                     | divided by 255                          |
"""

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import bpy
import mathutils
import numpy as np
import numpy.typing as npt
from PIL import Image

# isort: split
import bmesh  # exists only once bpy is loaded

from data_tools.assets.obj_materials import normalize_lines, translate_mtl
from lrm_pl.color_spaces import linear_to_srgb, srgb_to_linear

#: Corners are in one place if they are nearer than this, of the object's longest side.
_SAME_PLACE = 1e-6

#: Faces that share a place and both stay are this far apart, of the object's longest side.
_APART = 1e-4


def principled_shaders(material: bpy.types.Material) -> list[bpy.types.Node]:
    """Return the Principled BSDFs of a material."""
    tree = material.node_tree
    return [node for node in tree.nodes if node.type == "BSDF_PRINCIPLED"] if tree else []


def prepare_obj(path: Path, content: bytes, mtl_files: Iterable[Path], scratch: Path) -> Path:
    """Return a copy of an OBJ that names no other file; beside it the MTL of its name, which Blender reads unnamed.

    So no way to write a name, of which Blender understands more than we do, opens a file that we have not chosen.

    Args:
        path: The OBJ.
        content: Its content.
        mtl_files: Its MTL files.
        scratch: Where the copy is written.
    """
    copy = scratch / "readable.obj"
    copy.write_bytes(re.sub(rb"mtllib(?=[^\x21-\x7f]|\\)", b"#", normalize_lines(content)))
    copy.with_suffix(".mtl").write_bytes(translate_mtl(mtl_files))
    return copy


def visible_meshes() -> list[bpy.types.Object]:
    """Return the meshes with faces of the scene, without those that are hidden."""
    return [
        thing
        for thing in bpy.context.view_layer.objects
        if thing.type == "MESH" and not thing.hide_render and thing.data.polygons
    ]


def apply_vertex_colors() -> bool:
    """Show the colors at the vertices of meshes whose materials have neither a texture nor a color of their own.

    For files other than glTF, which says itself where they are shown.

    Returns:
        Whether there are any.
    """
    copies = dict[tuple[bpy.types.Material, str], bpy.types.Material]()
    _read_bytes_as_such()
    for thing in bpy.context.view_layer.objects:
        if thing.type != "MESH" or not thing.data.color_attributes:
            continue
        name = thing.data.color_attributes[0].name
        if not any(slot.material for slot in thing.material_slots):
            material = bpy.data.materials.new("vertex colors")
            material.use_nodes = True
            shader = material.node_tree.nodes["Principled BSDF"]
            shader.inputs["Specular IOR Level"].default_value = 0.0
            shader.inputs["Roughness"].default_value = 1.0
            thing.data.materials.clear()
            thing.data.materials.append(material)
        for slot in thing.material_slots:
            if slot.material and slot.material not in copies.values() and _is_gray(slot.material):
                key = (slot.material, name)
                if key not in copies:  # meshes without these colors keep the material
                    copies[key] = slot.material.copy()
                    _color_with(copies[key], name)
                slot.material = copies[key]
    return bool(copies)


def correct_fbx(path: Path) -> None:
    """Correct the colors of imported FBX materials, and of binary files their opacity and specular too."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if b"Blender" not in head:  # which writes linear light
        shaders = [shader for material in bpy.data.materials for shader in principled_shaders(material)]
        for color in [shader.inputs[name] for shader in shaders for name in ("Base Color", "Emission Color")]:
            color.default_value = (
                *(srgb_to_linear(min(max(x, 0.0), 1.0)) for x in color.default_value[:3]),
                1.0,
            )
    if not head.startswith(b"Kaydara FBX Binary"):
        return  # text, which the parser does not read
    from io_scene_fbx import parse_fbx

    try:
        root, _ = parse_fbx.parse(os.fspath(path))
    except Exception as error:  # it reads fewer files than the importer
        print(f"specular and opacity of FBX materials were not read: {error!r}")
        return
    found = [one for objects in root.elems if objects.id == b"Objects" for one in objects.elems]
    found = [one for one in found if one.id == b"Material"]
    names = [one.props[1].split(b"\0")[0].decode("utf-8", "replace") for one in found]
    for element, name in zip(found, names, strict=True):
        if names.count(name) > 1:
            continue  # Blender gives all but one another name
        parts = {part.id: part for part in element.elems}
        rows = [row.props for row in parts[b"Properties70"].elems] if b"Properties70" in parts else []
        values = {row[0]: row[4:] for row in rows if len(row) > 4}
        model = parts[b"ShadingModel"].props[0].lower() if b"ShadingModel" in parts else b""
        is_dark = any(not any(values.get(key, (1,))) for key in (b"SpecularFactor", b"SpecularColor"))
        for shader in principled_shaders(material) if (material := bpy.data.materials.get(name)) else ():
            if model == b"lambert" or is_dark:
                shader.inputs["Specular IOR Level"].default_value = 0.0
            if 0 < (opacity := _opacity(values)) < 1:
                shader.inputs["Alpha"].default_value = opacity


def _opacity(values: dict[bytes, list[float]]) -> float:
    """Return the opacity of an FBX material, by the rule of Blender's Python importer and of three.js."""
    opacity = 1 - values.get(b"TransparencyFactor", [0.0])[0]
    if opacity in (0, 1):
        opacity = values.get(b"Opacity", [1 - values.get(b"TransparentColor", [0.0])[0]])[0]
    return opacity


def _read_bytes_as_such() -> None:
    """Divide colors at vertices by 255 where a file writes them as bytes, and the importer took 1 for white."""
    layers = [mesh.color_attributes[0].data for mesh in bpy.data.meshes if mesh.color_attributes]
    colors = [np.empty((len(layer), 4), np.float32) for layer in layers]
    for layer, values in zip(layers, colors, strict=True):
        layer.foreach_get("color", values.reshape(-1))
    if max((float(values[:, :3].max(initial=0)) for values in colors), default=0) <= srgb_to_linear(2.0):
        return
    for layer, values in zip(layers, colors, strict=True):
        values[:, :3] = srgb_to_linear(linear_to_srgb(values[:, :3].clip(0)) / 255)
        layer.foreach_set("color", values.reshape(-1))


def _is_gray(material: bpy.types.Material) -> bool:
    colors = [shader.inputs["Base Color"] for shader in principled_shaders(material)]
    return any(not c.is_linked and max(c.default_value[:3]) - min(c.default_value[:3]) < 1e-3 for c in colors)


def _color_with(material: bpy.types.Material, attribute: str) -> None:
    node = material.node_tree.nodes.new("ShaderNodeVertexColor")
    node.layer_name = attribute
    for shader in principled_shaders(material):
        if not shader.inputs["Base Color"].is_linked:
            material.node_tree.links.new(node.outputs["Color"], shader.inputs["Base Color"])


def load_unsupported_images() -> None:
    """Open images that Blender cannot open (PPM, PCX, AVIF), and small GIFs, which it takes for movies."""
    for image in [image for image in bpy.data.images if image.filepath and image.size[0] == 0]:
        try:
            with Image.open(bpy.path.abspath(image.filepath)) as first:
                pixels = np.asarray(first.convert("RGBA"), dtype=np.float32)[::-1] / 255
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # counted as missing
        height, width = pixels.shape[:2]
        loaded = bpy.data.images.new(image.name, width, height, alpha=True)
        loaded.pixels.foreach_set(pixels.ravel())
        loaded.pack()
        loaded.alpha_mode = image.alpha_mode
        image.user_remap(loaded)
        bpy.data.images.remove(image)


def cull_back_faces() -> bool:
    """Apply back-face culling, which Cycles ignores: back faces of culled materials become transparent.

    Where no back face can be seen from outside, because the faces of an opaque material are closed and look outwards,
    nothing is changed: transparent surfaces cost time. Where they are closed and look inwards (outlines of drawn
    characters) they also let all light through, which they would keep from what they surround.

    Returns:
        Whether culled faces are open: some views do not see what others see.
    """
    one_sided = False
    meshes = list({thing.data: None for thing in visible_meshes()})
    for material in [m for m in bpy.data.materials if m.use_backface_culling and m.node_tree]:
        volumes = [volume for mesh in meshes if (volume := _closed_volume(mesh, material)) != 0]
        output = next((node for node in material.node_tree.nodes if node.type == "OUTPUT_MATERIAL"), None)
        if output is None or not output.inputs["Surface"].is_linked:
            continue
        one_sided |= -math.inf in volumes
        if is_opaque(material) and all(volume > 0 for volume in volumes):
            continue
        nodes, links = material.node_tree.nodes, material.node_tree.links
        surface = output.inputs["Surface"].links[0].from_socket
        hidden = nodes.new("ShaderNodeNewGeometry").outputs["Backfacing"]
        if all(-math.inf < volume < 0 for volume in volumes):
            other = nodes.new("ShaderNodeMath")
            other.operation = "SUBTRACT"  # 1 - 1 for rays of the camera, 1 for others
            other.inputs[0].default_value = 1.0
            links.new(nodes.new("ShaderNodeLightPath").outputs["Is Camera Ray"], other.inputs[1])
            both = nodes.new("ShaderNodeMath")
            both.operation = "MAXIMUM"
            links.new(hidden, both.inputs[0])
            links.new(other.outputs["Value"], both.inputs[1])
            hidden = both.outputs["Value"]
        mix = nodes.new("ShaderNodeMixShader")
        links.new(hidden, mix.inputs[0])
        links.new(surface, mix.inputs[1])
        links.new(nodes.new("ShaderNodeBsdfTransparent").outputs["BSDF"], mix.inputs[2])
        links.new(mix.outputs["Shader"], output.inputs["Surface"])
    return one_sided


def _closed_volume(mesh: bpy.types.Mesh, material: bpy.types.Material) -> float:
    """Return the volume that the faces of a material enclose: negative where they look inwards.

    0 where there are none, minus infinity where they are open: an edge has not two faces, once in each direction.
    """
    slots = [index for index, one in enumerate(mesh.materials) if one == material]
    if not slots:
        return 0.0
    points, corners, slot = _geometry(mesh)
    corners = corners[np.isin(slot, slots)]
    if not len(corners):
        return 0.0
    scale = max(float(np.ptp(points, axis=0).max()), 1e-30)
    _, place = np.unique((points / scale).round(6), axis=0, return_inverse=True)
    joined = place.reshape(-1)[corners]
    edges = np.concatenate([joined[:, [0, 1]], joined[:, [1, 2]], joined[:, [2, 0]]])
    edges = edges[edges[:, 0] != edges[:, 1]]
    count = int(place.max()) + 1
    if not np.array_equal(
        np.sort(edges[:, 0] * count + edges[:, 1]), np.sort(edges[:, 1] * count + edges[:, 0])
    ):
        return -math.inf
    a, b, c = (points[corners[:, i]] for i in range(3))
    return float((np.cross(a, b) * c).sum())


def _geometry(
    mesh: bpy.types.Mesh,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return the positions, the triangles, and the material's slot of each triangle."""
    points = np.empty(len(mesh.vertices) * 3, dtype=np.float32)
    mesh.vertices.foreach_get("co", points)
    mesh.calc_loop_triangles()
    corners = np.empty(len(mesh.loop_triangles) * 3, dtype=np.int32)
    mesh.loop_triangles.foreach_get("vertices", corners)
    slots = np.empty(len(mesh.loop_triangles), dtype=np.int32)
    mesh.loop_triangles.foreach_get("material_index", slots)
    return points.reshape(-1, 3).astype(np.float64), corners.reshape(-1, 3).astype(np.int64), slots


def flip_opposed_normals() -> None:
    """Turn the normals of a file that point to the back of their face: Cycles shades its front black with them."""
    for mesh in {thing.data: None for thing in visible_meshes()}:
        if not mesh.has_custom_normals:
            continue
        corners, faces = (
            np.empty((len(mesh.loops), 3), np.float32),
            np.empty((len(mesh.polygons), 3), np.float32),
        )
        mesh.corner_normals.foreach_get("vector", corners.reshape(-1))
        mesh.polygons.foreach_get(
            "normal", faces.reshape(-1)
        )  # polygon_normals are made of those of the file
        counts = np.empty(len(mesh.polygons), dtype=np.int32)
        mesh.polygons.foreach_get("loop_total", counts)
        opposed = (corners * np.repeat(faces, counts, axis=0)).sum(axis=1) < 0
        if opposed.any():
            corners[opposed] *= -1
            mesh.normals_split_custom_set(corners)


def is_opaque(material: bpy.types.Material | None) -> bool:
    """Say whether nothing can be seen through a material."""
    return material is None or all(
        not alpha.is_linked and alpha.default_value >= 1 for alpha in alpha_inputs(material)
    )


def alpha_inputs(material: bpy.types.Material) -> list[bpy.types.NodeSocket]:
    """Return the inputs that say how much of a material is seen."""
    tree = material.node_tree
    mixes = [node.inputs[0] for node in tree.nodes if node.type == "MIX_SHADER"] if tree else []
    unlit = [fac for fac in mixes if not (fac.is_linked and fac.links[0].from_node.type == "LIGHT_PATH")]
    return [shader.inputs["Alpha"] for shader in principled_shaders(material)] or unlit


def separate_duplicate_faces() -> float:
    """Leave one of several faces in one place, which cause ray-tracing artifacts; return the fraction deleted.

    Those that can all be seen stay, a little apart: what lies over an opaque face with an alpha of its own, and faces
    that look opposite ways, each seen from one side only.
    """
    things = visible_meshes()
    if not things:
        return 0.0
    bpy.context.evaluated_depsgraph_get()  # places everything
    size = _longest_side(things)
    faces = [_faces(thing, size) for thing in things]
    place, side, material, opaque = (np.concatenate(column) for column in zip(*faces, strict=True))
    level = _levels(place, side, material, opaque)
    edited = dict[tuple[str, float, bytes], bpy.types.Mesh]()
    start = 0
    for thing, own in zip(things, faces, strict=True):
        levels = level[start : start + len(own[0])]
        start += len(levels)
        if levels.any():
            step = _APART * size / max(*map(abs, thing.matrix_world.to_scale()), 1e-30)
            key = (thing.data.name, round(step, 9), levels.tobytes())
            if key not in edited:  # others that share the mesh keep it
                edited[key] = thing.data.copy()
                _set_apart(edited[key], levels, step)
            thing.data = edited[key]
    return float((level < 0).mean())


def _levels(
    place: npt.NDArray[np.uint64],
    side: npt.NDArray[np.uint8],
    material: npt.NDArray[np.int64],
    opaque: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int16]:
    """Return how many faces a face lies above, of those that stay in its place; -1 where it does not stay."""
    level = np.zeros(len(place), dtype=np.int16)
    _, inverse, counts = np.unique(place, return_inverse=True, return_counts=True)
    doubled = np.flatnonzero(counts[inverse] > 1)
    if not len(doubled):
        return level
    _, where = np.unique(inverse[doubled], return_inverse=True)
    side, opaque = side[doubled], opaque[doubled]
    # of the opaque ones one of each side, or one that is seen from both; of the others one of each material
    seen_from_both = np.zeros(int(where.max()) + 1, dtype=bool)
    seen_from_both[where[opaque & (side == 0)]] = True
    rows = np.stack([where, opaque, side, np.where(opaque, -1, material[doubled])], axis=1)
    stays = np.zeros(len(doubled), dtype=bool)
    stays[np.unique(rows, axis=0, return_index=True)[1]] = True
    stays &= ~(opaque & (side > 0) & seen_from_both[where])
    level[doubled[~stays]] = -1
    order = np.flatnonzero(stays)
    order = order[np.lexsort((order, ~opaque[order], where[order]))]
    starts = np.flatnonzero(np.diff(where[order], prepend=-1))
    lengths = np.diff(starts, append=len(order))
    level[doubled[order]] = np.arange(len(order)) - np.repeat(starts, lengths)
    return level


def _set_apart(mesh: bpy.types.Mesh, levels: npt.NDArray[np.int16], step: float) -> None:
    """Delete the faces of level -1, and move those of the others by as many steps the way they look."""
    editable = bmesh.new()
    editable.from_mesh(mesh)
    editable.faces.ensure_lookup_table()
    faces = list(editable.faces)
    for level in np.unique(levels[levels > 0]):
        above = [faces[int(index)] for index in np.flatnonzero(levels == level)]
        split = bmesh.ops.split(editable, geom=above)["geom"]
        for vertex in [one for one in split if isinstance(one, bmesh.types.BMVert)]:
            way = sum((face.normal for face in vertex.link_faces), mathutils.Vector())
            vertex.co += way.normalized() * (step * int(level))
    doubled = [faces[int(index)] for index in np.flatnonzero(levels < 0)]
    bmesh.ops.delete(editable, geom=doubled, context="FACES_ONLY")
    editable.to_mesh(mesh)
    editable.free()


def _longest_side(things: list[bpy.types.Object]) -> float:
    corners = []
    for thing in things:
        matrix = np.array(thing.matrix_world, dtype=np.float64)
        corners.append(
            np.array([list(corner) for corner in thing.bound_box]) @ matrix[:3, :3].T + matrix[:3, 3]
        )
    return float(np.ptp(np.concatenate(corners), axis=0).max())


def _faces(
    thing: bpy.types.Object, size: float
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Describe the faces of an object.

    Returns:
        Of each face a number of where its corners are, whatever their order; of the way it looks, 0 where it is seen
        from both sides; of its material; and whether that is opaque.
    """
    mesh = thing.data
    posed = thing.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
    points = np.empty(len(mesh.vertices) * 3, dtype=np.float32)
    (posed if len(posed.vertices) == len(mesh.vertices) else mesh).vertices.foreach_get("co", points)
    matrix = np.array(thing.matrix_world, dtype=np.float64)
    world = points.reshape(-1, 3).astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
    cells = np.rint(world / max(size * _SAME_PLACE, 1e-30)).astype(np.int64).astype(np.uint64)
    mixed = _mixed(cells[:, 0] ^ _mixed(cells[:, 1] ^ _mixed(cells[:, 2])))
    loops = np.empty(len(mesh.loops), dtype=np.int32)
    mesh.loops.foreach_get("vertex_index", loops)
    starts = np.empty(len(mesh.polygons), dtype=np.int32)
    mesh.polygons.foreach_get("loop_start", starts)
    slots = np.empty(len(mesh.polygons), dtype=np.int32)
    mesh.polygons.foreach_get("material_index", slots)
    materials = [slot.material for slot in thing.material_slots] or [None]
    slots = slots.clip(0, len(materials) - 1)
    normals = np.empty(len(mesh.polygons) * 3, dtype=np.float32)
    mesh.polygons.foreach_get("normal", normals)
    looks = normals.reshape(-1, 3) @ np.linalg.pinv(matrix[:3, :3])  # the inverse transposed
    largest = np.abs(looks).argmax(axis=1)
    side = 1 + 2 * largest + (np.take_along_axis(looks, largest[:, None], 1)[:, 0] > 0)
    one_sided = np.array([bool(m and m.use_backface_culling) for m in materials])
    return (
        np.add.reduceat(mixed[loops], starts),
        np.where(one_sided[slots], side, 0).astype(np.uint8),
        np.array([m.as_pointer() if m else 0 for m in materials], dtype=np.int64)[slots],
        np.array([is_opaque(m) for m in materials])[slots],
    )


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of 64-bit numbers (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def apply_texture(image: Path) -> None:
    """Lay an image on all meshes, by their texture coordinates."""
    material = bpy.data.materials.new("texture")
    material.use_nodes = True
    shader = material.node_tree.nodes["Principled BSDF"]
    shader.inputs["Specular IOR Level"].default_value = 0.0
    shader.inputs["Roughness"].default_value = 1.0
    node = material.node_tree.nodes.new("ShaderNodeTexImage")
    node.image = bpy.data.images.load(os.fspath(image.absolute()))
    material.node_tree.links.new(node.outputs["Color"], shader.inputs["Base Color"])
    for mesh in bpy.data.meshes:
        mesh.materials.clear()
        mesh.materials.append(material)
