"""Functions that read Blender mesh data as arrays. The module requires ``bpy``."""

import bpy
import numpy as np
import numpy.typing as npt


def read_floats(items: "bpy.types.bpy_prop_collection", name: str, width: int = 3) -> npt.NDArray[np.float32]:
    """Return a float attribute of the n items in a Blender collection, as an array of shape (n, width)."""
    values = np.empty((len(items), width), dtype=np.float32)
    items.foreach_get(name, values.reshape(-1))
    return values


def read_ints(items: "bpy.types.bpy_prop_collection", name: str) -> npt.NDArray[np.int32]:
    """Return an integer attribute of the n items in a Blender collection, as an array of shape (n,)."""
    values = np.empty(len(items), dtype=np.int32)
    items.foreach_get(name, values)
    return values


def read_triangles(
    mesh: bpy.types.Mesh,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the vertex positions (n, 3), the triangles (m, 3), and the material slot of each triangle (m,)."""
    mesh.calc_loop_triangles()
    corners = np.empty((len(mesh.loop_triangles), 3), dtype=np.int32)
    mesh.loop_triangles.foreach_get("vertices", corners.reshape(-1))
    slots = read_ints(mesh.loop_triangles, "material_index")
    return read_floats(mesh.vertices, "co").astype(np.float64), corners, slots


def transform(points: npt.NDArray[np.float64], matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Apply a (4, 4) affine matrix to points of shape (n, 3)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]
