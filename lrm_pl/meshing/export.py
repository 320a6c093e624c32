"""Mesh export to glb and obj with +y up, and to ply and stl with +z up, as is usual in 3D printing and scanning.

One scene unit corresponds to 1 meter in glTF, and to ``STL_MM`` millimeters in STL.
"""

import numpy as np
import trimesh
from PIL import Image
from trimesh.exchange.obj import export_obj
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import SimpleMaterial

from lrm_pl.images import encode_png
from lrm_pl.meshing.glb import Y_UP, encode_glb
from lrm_pl.meshing.mesh import Mesh, MeshFormat

#: Millimeters per scene unit in STL. An object with a bounding sphere of radius 1 is at most 100 mm wide.
STL_MM = 50.0


def encode_mesh(mesh: Mesh, file_format: MeshFormat, stem: str = "mesh") -> dict[str, bytes]:
    """Encode a mesh in a file format.

    Args:
        mesh: Mesh to encode.
        file_format: File format. glb and obj store the texture or vertex colors, ply stores vertex colors, and stl
            stores no colors.
        stem: File name without suffix.

    Returns:
        Mapping from file names to file contents. The first file is the mesh. Additional files (texture and material)
        must be stored in the same folder.
    """
    if file_format == "glb":
        return {f"{stem}.glb": encode_glb(mesh, stem)}
    if file_format == "obj":
        return _encode_obj(mesh, stem)
    vertices = mesh.vertices * STL_MM if file_format == "stl" else mesh.vertices
    return {f"{stem}.{file_format}": _trimesh(mesh, vertices).export(file_type=file_format)}


def _encode_obj(mesh: Mesh, stem: str) -> dict[str, bytes]:
    shape = _trimesh(mesh, mesh.vertices @ Y_UP.T)
    if mesh.texture is None:
        return {f"{stem}.obj": export_obj(shape).encode()}
    uv = np.stack([mesh.texture.uv[:, 0], 1 - mesh.texture.uv[:, 1]], axis=1)  # v points up in OBJ
    texture = Image.fromarray(mesh.texture.image)
    material = SimpleMaterial(image=texture, diffuse=(255, 255, 255, 255), name=stem)
    shape.visual = TextureVisuals(uv=uv, image=texture, material=material)
    text, others = export_obj(shape, return_texture=True, mtl_name=f"{stem}.mtl")
    files = {f"{stem}.obj": text} | others
    return {
        name: encode_png(content) if isinstance(content, Image.Image) else _to_bytes(content)
        for name, content in files.items()
    }


def _to_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _trimesh(mesh: Mesh, vertices: np.ndarray) -> trimesh.Trimesh:
    shape = trimesh.Trimesh(vertices, mesh.faces, process=False)
    shape.visual = ColorVisuals(shape, vertex_colors=np.rint(mesh.colors.clip(0, 1) * 255).astype(np.uint8))
    return shape
