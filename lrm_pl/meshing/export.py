"""A mesh as files: glb and obj (+y up), ply and stl (+z up, as those who print and scan have it).

Lengths are scene units, which glTF calls meters; those of STL, which slicers take for millimeters, are ``STL_MM`` each.
"""

import io

import numpy as np
import trimesh
from PIL import Image
from trimesh.exchange.obj import export_obj
from trimesh.visual import ColorVisuals, TextureVisuals
from trimesh.visual.material import SimpleMaterial

from lrm_pl.meshing.glb import Y_UP, encode_glb
from lrm_pl.meshing.mesh import Mesh, MeshFormat

#: Millimeters of a scene unit in STL: an object, whose bounding sphere has radius 1, is about 100 mm across.
STL_MM = 50.0


def encode_mesh(mesh: Mesh, kind: MeshFormat, stem: str = "mesh") -> dict[str, bytes]:
    """Encode a mesh.

    Args:
        mesh: The mesh.
        kind: What file. Of the colors, glb and obj hold a texture or the vertices', ply the vertices', stl none.
        stem: Name of the files without their endings.

    Returns:
        File name -> content; the first is the mesh, others (a texture, a material) belong beside it.
    """
    if kind == "glb":
        return {f"{stem}.glb": encode_glb(mesh, stem)}
    if kind == "obj":
        return _encode_obj(mesh, stem)
    vertices = mesh.vertices * STL_MM if kind == "stl" else mesh.vertices
    return {f"{stem}.{kind}": _trimesh(mesh, vertices).export(file_type=kind)}


def _encode_obj(mesh: Mesh, stem: str) -> dict[str, bytes]:
    vertices = mesh.vertices @ Y_UP.T
    if mesh.texture is None:
        return {f"{stem}.obj": export_obj(_trimesh(mesh, vertices)).encode()}
    shape = _trimesh(mesh, vertices)
    up = np.stack([mesh.texture.uv[:, 0], 1 - mesh.texture.uv[:, 1]], axis=1)  # OBJ counts from below
    texture = Image.fromarray(mesh.texture.image)
    material = SimpleMaterial(image=texture, diffuse=(255, 255, 255, 255), name=stem)
    shape.visual = TextureVisuals(uv=up, image=texture, material=material)
    text, others = export_obj(shape, return_texture=True, mtl_name=f"{stem}.mtl")
    return {f"{stem}.obj": text.encode()} | {name: _bytes(content) for name, content in others.items()}


def _bytes(content: bytes | str | Image.Image) -> bytes:
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, format="PNG")
        return file.getvalue()
    return content.encode() if isinstance(content, str) else content


def _trimesh(mesh: Mesh, vertices: np.ndarray) -> trimesh.Trimesh:
    shape = trimesh.Trimesh(vertices, mesh.faces, process=False)
    shape.visual = ColorVisuals(shape, vertex_colors=np.rint(mesh.colors.clip(0, 1) * 255).astype(np.uint8))
    return shape
