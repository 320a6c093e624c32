"""Export of meshes to binary glTF 2.0, with a matte material, +y up, lengths in meters and linear colors.

See https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html, sections 3.6 (accessors), 3.7.2 (attributes) and 4.4
(GLB).
"""

import json
import struct
from typing import Any, Final

import numpy as np
from PIL import Image

from lrm_pl import __version__
from lrm_pl.color_spaces import srgb_to_linear
from lrm_pl.images import encode_png
from lrm_pl.meshing.mesh import Mesh, vertex_normals

#: Codes of component types and buffer view targets in glTF, and element types by number of components.
_COMPONENT_TYPES: Final = {"uint16": 5123, "uint32": 5125, "float32": 5126}
_VERTICES, _INDICES = 34962, 34963
_ELEMENT_TYPES: Final = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}

#: Linear filters, mipmaps and clamping to the edge.
_SAMPLER: Final = {"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}

#: Rotation from +z up to +y up. The side of the object that faces the input camera (-y) then faces the viewer (+z).
Y_UP: Final = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=np.float32)


def encode_glb(mesh: Mesh, name: str = "object") -> bytes:
    """Encode a mesh as binary glTF. One scene unit is one meter.

    Args:
        mesh: Mesh to encode. If the mesh has a texture, vertex colors are omitted because viewers would multiply the
            texture by them.
        name: Name of the node and the mesh in the file.
    """
    vertices = mesh.vertices @ Y_UP.T
    arrays = {
        "POSITION": vertices.astype("<f4"),
        "NORMAL": vertex_normals(vertices, mesh.faces).astype("<f4"),
    }
    if mesh.texture is None:
        # Colors have 16 bits because 8 bits of linear color would show banding in dark areas.
        colors = np.rint(srgb_to_linear(mesh.colors.clip(0, 1)) * 65535)
        arrays["COLOR_0"] = np.pad(colors, ((0, 0), (0, 1)), constant_values=65535).astype("<u2")
    else:
        arrays["TEXCOORD_0"] = mesh.texture.uv.astype("<f4")
    arrays["indices"] = mesh.faces.astype("<u4").reshape(-1)
    contents = [values.tobytes() for values in arrays.values()]
    accessors = [_accessor(key, values, view) for view, (key, values) in enumerate(arrays.items())]
    indices = {key: number for number, key in enumerate(arrays)}
    primitive = {"indices": indices.pop("indices"), "attributes": indices, "material": 0, "mode": 4}
    surface: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    document: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": f"lrm_pl {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [{"primitives": [primitive], "name": name}],
        "materials": [{"name": "matte", "pbrMetallicRoughness": surface}],
        "accessors": accessors,
    }
    if mesh.texture is not None:
        surface["baseColorTexture"] = {"index": 0}
        document |= {
            "images": [{"bufferView": len(contents), "mimeType": "image/png"}],
            "samplers": [_SAMPLER],
            "textures": [{"source": 0, "sampler": 0}],
        }
        contents.append(encode_png(Image.fromarray(mesh.texture.image)))
    targets = {len(arrays) - 1: _INDICES} | dict.fromkeys(range(len(arrays) - 1), _VERTICES)
    data, document["bufferViews"] = bytearray(), []
    for number, content in enumerate(contents):
        view = {"buffer": 0, "byteOffset": len(data), "byteLength": len(content)}
        document["bufferViews"].append(view | ({"target": targets[number]} if number in targets else {}))
        data += content + bytes(-len(content) % 4)
    document["buffers"] = [{"byteLength": len(data)}]
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(data), b"BIN\0") + data
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _accessor(key: str, values: np.ndarray, view: int) -> dict[str, Any]:
    """Return the accessor of an array, which describes the type of the values in a buffer view."""
    accessor = {
        "bufferView": view,
        "componentType": _COMPONENT_TYPES[values.dtype.name],
        "count": len(values),
        "type": _ELEMENT_TYPES[values[0].size],
    }
    if key == "COLOR_0":
        accessor["normalized"] = True
    if key == "POSITION":
        accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
    return accessor
