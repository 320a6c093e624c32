"""Blender side: what a file means by its materials, where Blender's importers or Cycles take it otherwise. Needs bpy.

| the file says                                  | Blender                   | here                                    |
|------------------------------------------------|---------------------------|-----------------------------------------|
| MTL ``Kd``                                     | linear light              | sRGB, unless Blender wrote the MTL      |
| MTL ``Tf 1 1 1``, which 3ds Max and Maya write | glass                     | glass only with ``illum`` 4, 6, 7 or 9  |
| ``Kd 0.5``; names in quotes or not in UTF-8    | cyan; gray                | gray of 0.5; as any other name          |
| ``mtllib`` with several names, or a wrong one  | gray                      | each; the MTL of the OBJ's own name     |
| an MTL of the OBJ's name that it does not name | that one                  | not read if the named ones are there    |
| MTL ``map_Ka`` without ``map_Kd``              | no texture                | the texture                             |
| colors at vertices, and a material without one | the material's gray       | the colors                              |
| glTF without ``doubleSided``                   | both sides are seen       | back faces are not seen                 |
| a GIF as a texture                             | a movie, shown in magenta | its first picture                       |
| several faces in one place                     | black speckles            | one of them                             |
| an OBJ whose MTL is not there                  | gray                      | counted as a missing texture            |
| colors of faces in a PLY, other names of them  | gray                      | names: read; faces: counted as missing  |
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import bpy
import numpy as np
import numpy.typing as npt
from PIL import Image

# isort: split
import bmesh  # exists only once bpy is loaded

from data_tools.wavefront import plain_text, translated_mtl

#: Corners are in one place if they are nearer than this, of the object's longest side.
_SAME_PLACE = 1e-6


def principled(material: bpy.types.Material) -> list[bpy.types.Node]:
    """Return the Principled BSDFs of a material."""
    tree = material.node_tree
    return [node for node in tree.nodes if node.type == "BSDF_PRINCIPLED"] if tree else []


def readable_obj(path: Path, content: bytes, mtl_files: Iterable[Path], scratch: Path) -> Path:
    """Return a copy of an OBJ that names no other file; beside it the MTL of its name, which Blender reads unnamed.

    So no way to write a name, of which Blender understands more than we do, opens a file that we have not chosen.

    Args:
        path: The OBJ.
        content: Its content.
        mtl_files: Its MTL files.
        scratch: Where the copy is written.
    """
    copy = scratch / "readable.obj"
    copy.write_bytes(re.sub(rb"mtllib(?=[^\x21-\x7f]|\\)", b"#", plain_text(content)))
    copy.with_suffix(".mtl").write_bytes(translated_mtl(mtl_files))
    return copy


def show_vertex_colors() -> None:
    """Show the colors at the vertices of meshes whose materials have neither a texture nor a color of their own."""
    for mesh in bpy.data.meshes:
        if not mesh.color_attributes:
            continue
        name = mesh.color_attributes[0].name
        if not any(mesh.materials):
            material = bpy.data.materials.new("vertex colors")
            material.use_nodes = True
            shader = material.node_tree.nodes["Principled BSDF"]
            shader.inputs["Specular IOR Level"].default_value = 0.0
            shader.inputs["Roughness"].default_value = 1.0
            mesh.materials.clear()
            mesh.materials.append(material)
        for material in filter(None, mesh.materials):
            for shader in principled(material):
                color = shader.inputs["Base Color"]
                if not color.is_linked and max(color.default_value[:3]) - min(color.default_value[:3]) < 1e-3:
                    node = material.node_tree.nodes.new("ShaderNodeVertexColor")
                    node.layer_name = name
                    material.node_tree.links.new(node.outputs["Color"], color)


def show_movies_as_pictures() -> None:
    """Put the first picture of each movie that Blender cannot open (small GIFs) in its place."""
    for image in [image for image in bpy.data.images if image.source == "MOVIE" and image.size[0] == 0]:
        try:
            with Image.open(bpy.path.abspath(image.filepath)) as first:
                pixels = np.asarray(first.convert("RGBA"), dtype=np.float32)[::-1] / 255
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # counted as missing
        height, width = pixels.shape[:2]
        picture = bpy.data.images.new(image.name, width, height, alpha=True)
        picture.pixels.foreach_set(pixels.ravel())
        picture.pack()
        image.user_remap(picture)
        bpy.data.images.remove(image)


def hide_back_faces() -> None:
    """Apply back-face culling, which Cycles ignores: back faces of culled materials become transparent.

    Where no back face can be seen from outside, because the faces of a material are closed and look outwards, nothing
    is changed: transparent surfaces cost time. Where they are closed and look inwards (outlines of drawn characters)
    they also let all light through, which they would keep from what they surround.
    """
    for material in [m for m in bpy.data.materials if m.use_backface_culling and m.node_tree]:
        volumes = [volume for mesh in bpy.data.meshes if (volume := _closed_volume(mesh, material)) != 0]
        output = next((node for node in material.node_tree.nodes if node.type == "OUTPUT_MATERIAL"), None)
        if all(volume > 0 for volume in volumes) or output is None or not output.inputs["Surface"].is_linked:
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


def drop_doubled_faces() -> float:
    """Delete duplicate faces, which cause ray-tracing artifacts, and return the fraction deleted.

    Faces that look opposite ways, each seen from one side only, both stay.
    """
    shown = [
        thing
        for thing in bpy.data.objects
        if thing.type == "MESH" and not thing.hide_render and thing.data.polygons
    ]
    things = list({thing.data: thing for thing in shown}.values())  # one of those that share a mesh
    if not things:
        return 0.0
    marks = [_face_marks(thing, _longest_side(shown)) for thing in things]
    marked = np.concatenate(marks)
    _, first = np.unique(marked, return_index=True)
    kept = np.zeros(len(marked), dtype=bool)
    kept[first] = True
    start = 0
    for thing, own in zip(things, marks, strict=True):
        doubled = np.flatnonzero(~kept[start : start + len(own)])
        start += len(own)
        if len(doubled):
            editable = bmesh.new()
            editable.from_mesh(thing.data)
            editable.faces.ensure_lookup_table()
            faces = [editable.faces[int(index)] for index in doubled]
            bmesh.ops.delete(editable, geom=faces, context="FACES_ONLY")
            editable.to_mesh(thing.data)
            editable.free()
    return float(1 - kept.mean())


def _longest_side(things: list[bpy.types.Object]) -> float:
    corners = []
    for thing in things:
        matrix = np.array(thing.matrix_world, dtype=np.float64)
        corners.append(
            np.array([list(corner) for corner in thing.bound_box]) @ matrix[:3, :3].T + matrix[:3, 3]
        )
    return float(np.ptp(np.concatenate(corners), axis=0).max())


def _face_marks(thing: bpy.types.Object, size: float) -> npt.NDArray[np.uint64]:
    """Return a number a face, of where its corners are whatever their order; and of its side, if it has one."""
    mesh = thing.data
    points = np.empty(len(mesh.vertices) * 3, dtype=np.float32)
    mesh.vertices.foreach_get("co", points)
    matrix = np.array(thing.matrix_world, dtype=np.float64)
    world = points.reshape(-1, 3).astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
    cells = np.rint(world / max(size * _SAME_PLACE, 1e-30)).astype(np.int64).astype(np.uint64)
    mixed = _mixed(cells[:, 0] ^ _mixed(cells[:, 1] ^ _mixed(cells[:, 2])))
    loops = np.empty(len(mesh.loops), dtype=np.int32)
    mesh.loops.foreach_get("vertex_index", loops)
    starts = np.empty(len(mesh.polygons), dtype=np.int32)
    mesh.polygons.foreach_get("loop_start", starts)
    marks = np.add.reduceat(mixed[loops], starts)
    slots = np.empty(len(mesh.polygons), dtype=np.int32)
    mesh.polygons.foreach_get("material_index", slots)
    one_sided = np.array([bool(m and m.use_backface_culling) for m in mesh.materials] or [False])
    normals = np.empty(len(mesh.polygons) * 3, dtype=np.float32)
    mesh.polygons.foreach_get("normal", normals)
    looks = normals.reshape(-1, 3) @ np.linalg.inv(matrix[:3, :3])  # the inverse transposed
    largest = np.abs(looks).argmax(axis=1)
    side = 1 + 2 * largest + (np.take_along_axis(looks, largest[:, None], 1)[:, 0] > 0)
    return marks + np.where(one_sided[slots.clip(0, len(one_sided) - 1)], side, 0).astype(np.uint64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of 64-bit numbers (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def readable_ply(path: Path, scratch: Path) -> tuple[Path, bool]:
    """Return a PLY as Blender's importer reads it: usual names of colors, line feeds; and whether faces have colors.

    Args:
        path: The file.
        scratch: Where a copy is written if one is needed.
    """
    content = path.read_bytes()
    end = re.search(rb"end_header[ \t]*(\r\n|\r|\n)", content[: 1 << 20])
    if end is None:
        return path, False
    header, body = content[: end.end()], content[end.end() :]
    is_text = b"format ascii" in header
    lines = re.split(rb"\r\n|\r|\n", header.rstrip(b"\r\n"))
    element, faces_have_colors, renamed = b"", False, []
    for line in lines:
        words = line.split()
        if words[:1] == [b"element"]:
            element = words[1]
        if words[:1] == [b"property"] and len(words) == 3:
            name = _COLORS.get(words[2].lower(), words[2])
            faces_have_colors |= element == b"face" and name in _COLORS.values()
            words[2] = name
            line = b" ".join(words) if element == b"vertex" else line
        renamed.append(line)
    written = b"\n".join(renamed) + b"\n"
    if is_text and b"\r" in body:
        body = re.sub(rb"\r\n|\r", b"\n", body)
    if written + body == content:
        return path, faces_have_colors
    copy = scratch / f"readable-{path.name}"
    copy.write_bytes(written + body)
    return copy, faces_have_colors


_COLORS = {
    spelling: color
    for color, letter in ((b"red", b"r"), (b"green", b"g"), (b"blue", b"b"), (b"alpha", b"a"))
    for spelling in (color, b"diffuse_" + color, letter, b"vertex_" + color, b"color_" + letter)
}
