"""Export of meshes to binary glTF 2.0, with a matte material, +y up, meters and linear colors.

See https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html, sections 3.6 (accessors), 3.7.2 (attributes) and 4.4
(GLB).
"""

import io
import json
import struct
from typing import Any, Final

import numpy as np
from PIL import Image

from lrm_pl import __version__
from lrm_pl.color_spaces import srgb_to_linear
from lrm_pl.meshing.mesh import Mesh, vertex_normals

#: Codes of component types and buffer view targets in glTF.
_UINT16, _UINT32, _FLOAT = 5123, 5125, 5126
_VERTICES, _INDICES = 34962, 34963

#: Rotation from +z up to +y up. The side of the object that faces the input camera (-y) then faces the viewer (+z).
Y_UP: Final = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=np.float32)


def encode_glb(mesh: Mesh, name: str = "object") -> bytes:
    """Encode a mesh as binary glTF. One scene unit is one meter.

    Args:
        mesh: Mesh to encode. If the mesh has a texture, vertex colors are omitted because viewers would multiply the
            texture by them.
        name: Name of the node and the mesh in the file.
    """
    builder = _Builder()
    vertices = mesh.vertices @ Y_UP.T
    attributes = {
        "POSITION": builder.add_values(vertices, "VEC3", _FLOAT, bounds=True),
        "NORMAL": builder.add_values(vertex_normals(vertices, mesh.faces), "VEC3", _FLOAT),
    }
    surface: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    if mesh.texture is None:
        # Colors have 16 bits because 8 bits of linear color would show banding in dark areas.
        colors = np.rint(srgb_to_linear(mesh.colors.clip(0, 1)) * 65535)
        opaque = np.concatenate([colors, np.full((len(colors), 1), 65535)], axis=1).astype("<u2")
        attributes["COLOR_0"] = builder.add_values(opaque, "VEC4", _UINT16)
    else:
        attributes["TEXCOORD_0"] = builder.add_values(mesh.texture.uv, "VEC2", _FLOAT)
        surface["baseColorTexture"] = {"index": 0}
        builder.add_texture(mesh.texture.image)
    indices = builder.add_values(mesh.faces.astype("<u4").reshape(-1), "SCALAR", _UINT32)
    primitive = {"attributes": attributes, "indices": indices, "material": 0, "mode": 4}
    content = {
        "asset": {"version": "2.0", "generator": f"lrm_pl {__version__}"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [{"primitives": [primitive], "name": name}],
        "materials": [{"name": "matte", "pbrMetallicRoughness": surface}],
        **builder.document(),
    }
    return _container(json.dumps(content, separators=(",", ":")).encode(), bytes(builder.data))


class _Builder:
    """Builder of the binary buffer and of the JSON properties that describe the buffer."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._views: list[dict[str, Any]] = []
        self._accessors: list[dict[str, Any]] = []
        self._images: dict[str, Any] = {}

    def add_values(
        self, values: np.ndarray, element_type: str, component: int, *, bounds: bool = False
    ) -> int:
        """Add an array and return the index of its accessor."""
        values = values.astype({_FLOAT: "<f4", _UINT16: "<u2", _UINT32: "<u4"}[component])
        view = self._add_view(values.tobytes(), target=_INDICES if element_type == "SCALAR" else _VERTICES)
        accessor = {
            "bufferView": view,
            "componentType": component,
            "count": len(values),
            "type": element_type,
        }
        if component == _UINT16:
            accessor["normalized"] = True
        if bounds:
            accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        self._accessors.append(accessor)
        return len(self._accessors) - 1

    def add_texture(self, image: np.ndarray) -> None:
        """Add a uint8 texture of shape (H, W, 3) and a sampler."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        self._images = {
            "images": [{"bufferView": self._add_view(file.getvalue()), "mimeType": "image/png"}],
            "samplers": [{"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}],
            "textures": [{"source": 0, "sampler": 0}],
        }

    def document(self) -> dict[str, Any]:
        """Return the JSON properties of the buffer and everything it contains."""
        return {
            "buffers": [{"byteLength": len(self.data)}],
            "bufferViews": self._views,
            "accessors": self._accessors,
            **self._images,
        }

    def _add_view(self, content: bytes, target: int | None = None) -> int:
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(content)}
        self._views.append(view if target is None else view | {"target": target})
        self.data += content + bytes(-len(content) % 4)
        return len(self._views) - 1


def _container(text: bytes, binary: bytes) -> bytes:
    text += b" " * (-len(text) % 4)
    binary += bytes(-len(binary) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks
