"""Correction of duplicate faces, back faces and normals for Cycles. The module requires ``bpy``."""

import math

import bpy
import mathutils
import numpy as np
import numpy.typing as npt

# isort: split
import bmesh  # available only after bpy is imported

from data_tools.blender.attributes import read_floats, read_ints, read_triangles, transform
from data_tools.blender.materials import is_opaque

#: Distance below which corners coincide, as a fraction of the longest side of the object.
_COINCIDENT = 1e-6

#: Distance by which coincident faces are separated, as a fraction of the longest side of the object.
_SEPARATION = 1e-4


def visible_meshes() -> list[bpy.types.Object]:
    """Return the visible mesh objects that have faces."""
    return [
        obj
        for obj in bpy.context.view_layer.objects
        if obj.type == "MESH" and not obj.hide_render and obj.data.polygons
    ]


def cull_back_faces() -> bool:
    """Make the back faces of materials with back-face culling transparent, because Cycles ignores this setting.

    Opaque materials with closed, outward-facing surfaces are not changed, because their back faces are not visible and
    transparency is slow to render. Closed, inward-facing surfaces, which are used for the outlines of cartoon
    characters, are transparent for all rays except camera rays.

    Returns:
        Whether there is an open surface with back-face culling, which is visible from one side only.
    """
    one_sided = False
    meshes = list({obj.data: None for obj in visible_meshes()})
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
        transparent = nodes.new("ShaderNodeBsdfTransparent").outputs["BSDF"]
        backfacing = nodes.new("ShaderNodeNewGeometry").outputs["Backfacing"]
        mix = nodes.new("ShaderNodeMixShader")
        if all(-math.inf < volume < 0 for volume in volumes):
            visible = nodes.new("ShaderNodeMath")  # 1 for camera rays that hit the front side
            visible.operation = "GREATER_THAN"
            links.new(nodes.new("ShaderNodeLightPath").outputs["Is Camera Ray"], visible.inputs[0])
            links.new(backfacing, visible.inputs[1])
            sources = visible.outputs["Value"], transparent, surface
        else:
            sources = backfacing, surface, transparent
        for source, target in zip(sources, mix.inputs, strict=True):
            links.new(source, target)
        links.new(mix.outputs["Shader"], output.inputs["Surface"])
    return one_sided


def _closed_volume(mesh: bpy.types.Mesh, material: bpy.types.Material) -> float:
    """Return a number that is proportional to the signed volume enclosed by the faces of a material.

    The number is negative if the faces point inward, 0 if there are no faces, and minus infinity if the surface is
    open, which means that an edge does not belong to two faces with consistent orientation.
    """
    if material not in mesh.materials[:]:
        return 0.0
    points, corners, slots = read_triangles(mesh)
    corners = corners[np.array([one == material for one in mesh.materials])[slots]]
    if not len(corners):
        return 0.0
    scale = max(float(np.ptp(points, axis=0).max()), 1e-30)
    _, position = np.unique((points / scale).round(6), axis=0, return_inverse=True)
    joined = position.reshape(-1)[corners]
    edges = np.concatenate([joined[:, [0, 1]], joined[:, [1, 2]], joined[:, [2, 0]]])
    edges = edges[edges[:, 0] != edges[:, 1]]
    count = int(position.max()) + 1
    if not np.array_equal(
        np.sort(edges[:, 0] * count + edges[:, 1]), np.sort(edges[:, 1] * count + edges[:, 0])
    ):
        return -math.inf
    a, b, c = (points[corners[:, i]] for i in range(3))
    return float((np.cross(a, b) * c).sum())


def flip_opposed_normals() -> None:
    """Flip custom normals that point to the back of a face, because Cycles renders them black."""
    for mesh in {obj.data: None for obj in visible_meshes()}:
        if not mesh.has_custom_normals:
            continue
        corners = read_floats(mesh.corner_normals, "vector")
        faces = read_floats(mesh.polygons, "normal")  # computed from the geometry, unlike polygon_normals
        counts = read_ints(mesh.polygons, "loop_total")
        opposed = (corners * np.repeat(faces, counts, axis=0)).sum(axis=1) < 0
        if opposed.any():
            corners[opposed] *= -1
            mesh.normals_split_custom_set(corners)


def separate_duplicate_faces() -> float:
    """Remove duplicate faces, because they cause artifacts in ray tracing.

    Coincident faces that are all visible are not removed but separated by a small distance. These are transparent faces
    on an opaque face, and single-sided faces with opposite orientations.

    Returns:
        Number of removed faces divided by the total number of faces.
    """
    objects = visible_meshes()
    if not objects:
        return 0.0
    bpy.context.evaluated_depsgraph_get()  # updates world matrices
    size = _longest_side(objects)
    faces = [_faces(obj, size) for obj in objects]
    position, side, material, opaque = (np.concatenate(column) for column in zip(*faces, strict=True))
    level = _levels(position, side, material, opaque)
    edited = dict[tuple[str, float, bytes], bpy.types.Mesh]()
    start = 0
    for obj, own in zip(objects, faces, strict=True):
        levels = level[start : start + len(own[0])]
        start += len(levels)
        if levels.any():
            step = _SEPARATION * size / max(*map(abs, obj.matrix_world.to_scale()), 1e-30)
            key = (obj.data.name, round(step, 9), levels.tobytes())
            if key not in edited:  # the mesh is copied, because other objects may share it
                edited[key] = obj.data.copy()
                _offset_faces(edited[key], levels, step)
            obj.data = edited[key]
    return float((level < 0).mean())


def _levels(
    position: npt.NDArray[np.uint64],
    side: npt.NDArray[np.uint8],
    material: npt.NDArray[np.int64],
    opaque: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int16]:
    """Return the level of each face, which determines its offset.

    Coincident faces that are kept have the levels 0, 1, and so on. The level of faces to remove is -1.

    Args:
        position: (n,) hashes of the corner positions.
        side: (n,) orientations, where 0 is a double-sided face.
        material: (n,) ids of the materials.
        opaque: (n,) whether the material of the face is opaque.
    """
    level = np.zeros(len(position), dtype=np.int16)
    _, inverse, counts = np.unique(position, return_inverse=True, return_counts=True)
    duplicates = np.flatnonzero(counts[inverse] > 1)
    if not len(duplicates):
        return level
    _, where = np.unique(inverse[duplicates], return_inverse=True)
    side, opaque = side[duplicates], opaque[duplicates]
    # keep one double-sided opaque face or one opaque face per orientation, and one transparent face per material
    double_sided = np.zeros(int(where.max()) + 1, dtype=bool)
    double_sided[where[opaque & (side == 0)]] = True
    rows = np.stack([where, opaque, side, np.where(opaque, -1, material[duplicates])], axis=1)
    kept = np.zeros(len(duplicates), dtype=bool)
    kept[np.unique(rows, axis=0, return_index=True)[1]] = True
    kept &= ~(opaque & (side > 0) & double_sided[where])
    level[duplicates[~kept]] = -1
    order = np.flatnonzero(kept)
    order = order[np.lexsort((order, ~opaque[order], where[order]))]
    starts = np.flatnonzero(np.diff(where[order], prepend=-1))
    lengths = np.diff(starts, append=len(order))
    level[duplicates[order]] = np.arange(len(order)) - np.repeat(starts, lengths)
    return level


def _offset_faces(mesh: bpy.types.Mesh, levels: npt.NDArray[np.int16], step: float) -> None:
    """Remove faces with level -1, and move all other faces by ``level * step`` along the normals."""
    editable = bmesh.new()
    editable.from_mesh(mesh)
    editable.faces.ensure_lookup_table()
    faces = list(editable.faces)
    for level in np.unique(levels[levels > 0]):
        above = [faces[int(index)] for index in np.flatnonzero(levels == level)]
        split = bmesh.ops.split(editable, geom=above)["geom"]
        for vertex in [one for one in split if isinstance(one, bmesh.types.BMVert)]:
            direction = sum((face.normal for face in vertex.link_faces), mathutils.Vector())
            vertex.co += direction.normalized() * (step * int(level))
    duplicates = [faces[int(index)] for index in np.flatnonzero(levels < 0)]
    bmesh.ops.delete(editable, geom=duplicates, context="FACES_ONLY")
    editable.to_mesh(mesh)
    editable.free()


def _longest_side(objects: list[bpy.types.Object]) -> float:
    corners = [transform(np.array(obj.bound_box), np.array(obj.matrix_world)) for obj in objects]
    return float(np.ptp(np.concatenate(corners), axis=0).max())


def _faces(
    obj: bpy.types.Object, size: float
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the properties of each face that are used to detect duplicates.

    Args:
        obj: Mesh object.
        size: Longest side of the bounding box of all objects.

    Returns:
        Four arrays with one item per face, which contain a hash of the corner positions that does not depend on the
        order of the corners, the orientation (0 if double-sided), an id of the material, and whether the material is
        opaque.
    """
    mesh = obj.data
    posed = obj.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
    points = read_floats((posed if len(posed.vertices) == len(mesh.vertices) else mesh).vertices, "co")
    matrix = np.array(obj.matrix_world, dtype=np.float64)
    world = transform(points.astype(np.float64), matrix)
    cells = np.rint(world / max(size * _COINCIDENT, 1e-30)).astype(np.int64).astype(np.uint64)
    hashes = _mix_bits(cells[:, 0] ^ _mix_bits(cells[:, 1] ^ _mix_bits(cells[:, 2])))
    materials = [slot.material for slot in obj.material_slots] or [None]
    slots = read_ints(mesh.polygons, "material_index").clip(0, len(materials) - 1)
    orientations = read_floats(mesh.polygons, "normal") @ np.linalg.pinv(matrix[:3, :3])  # inverse transpose
    largest = np.abs(orientations).argmax(axis=1)
    side = 1 + 2 * largest + (np.take_along_axis(orientations, largest[:, None], 1)[:, 0] > 0)
    one_sided = np.array([bool(m and m.use_backface_culling) for m in materials])
    return (
        np.add.reduceat(
            hashes[read_ints(mesh.loops, "vertex_index")], read_ints(mesh.polygons, "loop_start")
        ),
        np.where(one_sided[slots], side, 0).astype(np.uint8),
        np.array([m.as_pointer() if m else 0 for m in materials], dtype=np.int64)[slots],
        np.array([is_opaque(m) for m in materials])[slots],
    )


def _mix_bits(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of 64-bit numbers with the finalizer of MurmurHash3."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
