"""Blender side: glTF files as they are meant, where Blender's importer takes them otherwise. Needs bpy.

| the file says                                          | Blender                    | here                          |
|--------------------------------------------------------|----------------------------|-------------------------------|
| attributes of an application's own (``_NAME``)         | mixed up (up to 5.0.1)     | left out                      |
| nodes with ``visible`` false                           | seen                       | not seen, nor what hangs under|
| a node's ``matrix`` with a shear                       | the shear is lost          | two nodes without one         |
| ``COLOR_0`` and no material                            | veiled with gloss          | glTF's default material       |
| ``TEXCOORD_1`` without ``TEXCOORD_0``                  | one texel everywhere       | the image                   |
| two faces of the same vertices, that look two ways     | the second is left out     | both                          |
| positions that are not finite                          | the origin                 | refused                       |
| damaged Draco data                                     | that part is left out      | refused                       |
"""

import copy
import json
import re
import struct
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import bpy
import numpy as np

from data_tools.assets.asset_list import AssetError

GLTF_SUFFIXES = (".glb", ".gltf")

#: Cosine of the angle between two axes of a node from which on it is sheared: above the rounding of exporters.
_SHEARED = 1e-4


def external_uris(path: Path) -> list[str]:
    """Return the URIs of the buffers and images in a glTF file, without those that hold their data."""
    record = _read_json(path)
    try:
        if str(record.get("asset", {}).get("version", "2.0")).startswith("1."):
            raise AssetError("cannot be imported: expected glTF 2.0, but found version 1.0: convert it")
        found = [
            str(entry.get("uri", "")) for kind in ("buffers", "images") for entry in record.get(kind, ())
        ]
    except AssetError:
        raise
    except (AttributeError, TypeError) as error:
        raise AssetError(f"cannot be imported: expected JSON, but found {error}") from error
    return [unquote(uri) for uri in found if uri and not _is_inline(uri)]


def _read_json(path: Path) -> Any:  # noqa: ANN401 - whatever a file holds
    try:
        return json.loads(_json_of_glb(path) if path.suffix.lower() == ".glb" else path.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, AssetError):
            raise
        raise AssetError(f"cannot be imported: expected JSON, but found {error}") from error


def _json_of_glb(path: Path) -> bytes:
    """Read the JSON of a binary glTF file (section 4.4)."""
    with open(path, "rb") as file:
        head = file.read(20)
        if len(head) < 20 or head[:4] != b"glTF":
            raise AssetError("cannot be imported: expected a binary glTF file, but found something else")
        if (version := struct.unpack("<I", head[4:8])[0]) != 2:
            raise AssetError(
                f"cannot be imported: expected glTF 2.0, but found version {version}.0: convert it"
            )
        return file.read(struct.unpack("<I", head[12:16])[0])


def _is_inline(uri: str) -> bool:
    """Return whether a URI holds its data; Blender's importer opens other ``data:`` URIs as paths of files."""
    return uri.startswith("data:") and ";base64," in uri


def prepare_gltf(path: Path, scratch: Path) -> Path:
    """Return a glTF file whose JSON Blender's importer takes as it is meant.

    Args:
        path: The file.
        scratch: Where a copy is written, if one is needed.
    """
    record = _read_json(path)
    try:
        before = copy.deepcopy(record)
        for primitive in (one for mesh in record.get("meshes", ()) for one in mesh["primitives"]):
            _mend_attributes(primitive, record)
        _split_sheared_nodes(record)
        if record == before:
            return path
        for entry in (one for kind in ("buffers", "images") for one in record.get(kind, ())):
            uri = entry.get("uri")
            # A path in the copy must be the one that was checked: it starts from the original's folder.
            if uri and not _is_inline(uri):
                entry["uri"] = quote(str(path.parent.absolute() / unquote(uri)))
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise AssetError(f"cannot be imported: expected meshes of glTF 2.0, but found {error!r}") from error
    text = json.dumps(record).encode()
    if path.suffix.lower() == ".glb":
        text += b" " * (-len(text) % 4)
        whole = path.read_bytes()
        rest = whole[20 + struct.unpack("<I", whole[12:16])[0] :]
        head = struct.pack("<4sIIII", b"glTF", 2, 20 + len(text) + len(rest), len(text), 0x4E4F534A)
        text = head + text + rest
    readable = scratch / path.name
    readable.write_bytes(text)
    return readable


def _mend_attributes(primitive: dict[str, Any], record: dict[str, Any]) -> None:
    """Leave an application's own attributes out, fill gaps of texture coordinates, give colors a material."""
    attributes = primitive["attributes"]
    for name in [name for name in attributes if name.startswith("_")]:
        del attributes[name]
    if sets := [int(name[9:]) for name in attributes if re.fullmatch(r"TEXCOORD_\d", name)]:
        for number in range(max(sets)):
            attributes.setdefault(f"TEXCOORD_{number}", attributes[f"TEXCOORD_{max(sets)}"])
    if "COLOR_0" in attributes and "material" not in primitive:
        materials = record.setdefault("materials", [])
        primitive["material"] = len(materials)
        materials.append({})


def _split_sheared_nodes(record: dict[str, Any]) -> None:
    """Put a node with a rotation and scales over each node whose matrix is no rotation times scales."""
    nodes = record.get("nodes", [])
    for index, node in enumerate(nodes[:]):
        matrix = np.array(node.get("matrix", np.eye(4).ravel()), np.float64).reshape(4, 4).T
        axes = matrix[:3, :3]
        lengths = np.linalg.norm(axes, axis=0)
        cosines = np.triu(np.abs(axes.T @ axes), 1)
        if (cosines <= _SHEARED * np.outer(lengths, lengths)).all():
            continue
        left, scales, right = np.linalg.svd(axes)
        for rotation, axis in ((left, (slice(None), 2)), (right, (2, slice(None)))):
            if np.linalg.det(rotation) < 0:
                rotation[axis] *= -1
                scales[2] *= -1
        outer, inner = matrix.copy(), np.eye(4)
        outer[:3, :3], inner[:3, :3] = left * scales, right
        node["matrix"] = inner.T.ravel().tolist()
        for lists, key in ((nodes, "children"), (record.get("scenes", ()), "nodes")):
            for holder in lists:
                if index in holder.get(key, ()):
                    holder[key] = [len(nodes) if one == index else one for one in holder[key]]
        nodes.append({"matrix": outer.T.ravel().tolist(), "children": [index]})


def import_gltf(file: str) -> set[str]:
    """Import a glTF file.

    Raises:
        AssetError: A position is not finite, or compressed data are damaged.
    """
    hooks = _Hooks()
    addon = sys.modules["io_scene_gltf2"]
    addon.glTF2ImportUserExtension = lambda: hooks  # type: ignore[attr-defined]  # where the importer looks for hooks
    outcome = set(bpy.ops.import_scene.gltf(filepath=file, disable_bone_shape=True))
    if hooks.broken:
        raise AssetError(f"{hooks.broken[0]}; mend it in the program that made it")
    return outcome


class _Hooks:
    """Hooks of Blender's glTF importer.

    Attributes:
        broken: What is wrong with meshes that the importer shows otherwise.
    """

    extensions = (types.SimpleNamespace(name="KHR_node_visibility", required=True),)

    def __init__(self) -> None:
        self.broken = list[str]()
        self._hidden: set[int] | None = None

    def gather_import_node_after_hook(
        self,
        vnode: types.SimpleNamespace,
        _: object,
        thing: bpy.types.Object,
        importer: types.SimpleNamespace,
    ) -> None:
        """Hide an object whose node, or the node that it hangs under, is not visible."""
        if self._hidden is None:
            self._hidden = self._find_hidden(importer.data.nodes)
        if {vnode.mesh_node_idx, vnode.parent} & self._hidden:
            thing.hide_render = True

    @staticmethod
    def _find_hidden(nodes: Sequence[types.SimpleNamespace]) -> set[int]:
        switches = [(node.extensions or {}).get("KHR_node_visibility", {}) for node in nodes]
        pending = [index for index, switch in enumerate(switches) if switch.get("visible") is False]
        hidden = set[int]()
        while pending:
            hidden.add(index := pending.pop())
            pending += [child for child in nodes[index].children or () if child not in hidden]
        return hidden

    def gather_import_mesh_before_hook(
        self, mesh: types.SimpleNamespace, importer: types.SimpleNamespace
    ) -> None:
        """Note positions that are not finite, and give faces that share all vertices with another one their own."""
        try:
            for primitive in list(mesh.primitives):
                if "KHR_draco_mesh_compression" not in (primitive.extensions or {}):
                    self._look_at(primitive, mesh, importer)
        except Exception as error:  # the importer would drop it, and the checks with it
            self.broken.append(f"expected a mesh that can be read, but found {error!r} in mesh {mesh.name!r}")

    def _look_at(
        self, primitive: types.SimpleNamespace, mesh: types.SimpleNamespace, importer: types.SimpleNamespace
    ) -> None:
        from io_scene_gltf2.io.imp.gltf2_io_binary import BinaryData

        decode: Callable[..., Any] = BinaryData.decode_accessor
        if "POSITION" in primitive.attributes:
            positions = decode(importer, primitive.attributes["POSITION"])
            if not np.isfinite(positions).all():
                self.broken.append(
                    f"expected finite vertex positions, but found NaN or infinity in mesh {mesh.name!r}"
                )
        if primitive.mode not in (None, 4) or primitive.indices is None:
            return
        indices = decode(importer, primitive.indices).reshape(-1)
        faces = indices[: len(indices) // 3 * 3].reshape(-1, 3)
        keys = np.sort(faces.astype(np.uint64), axis=1) @ np.array([1, 1 << 21, 1 << 42], np.uint64)
        first = np.unique(keys, return_index=True)[1]
        if len(first) < len(faces):
            again = np.ones(len(faces), bool)
            again[first] = False
            other = copy.copy(primitive)
            primitive.indices = self._add_indices(importer, faces[~again])
            other.indices = self._add_indices(importer, faces[again])
            mesh.primitives.append(other)

    def gather_import_decode_primitive(
        self,
        mesh: types.SimpleNamespace,
        primitive: types.SimpleNamespace,
        _: object,
        importer: types.SimpleNamespace,
    ) -> None:
        """Note compressed meshes that could not be decompressed: the importer leaves them out."""
        used = [primitive.attributes.get("POSITION"), primitive.indices]
        if "KHR_draco_mesh_compression" in (primitive.extensions or {}) and any(
            importer.data.accessors[one].buffer_view is None for one in used if one is not None
        ):
            self.broken.append(f"expected Draco data, but found other data in mesh {mesh.name!r}")

    @staticmethod
    def _add_indices(importer: types.SimpleNamespace, faces: Any) -> int:  # noqa: ANN401 - an array
        from io_scene_gltf2.io.com.gltf2_io import Accessor, BufferView

        data, content = importer.data, np.ascontiguousarray(faces, "<u4").tobytes()
        buffer = max([len(data.buffers or ()), *(number + 1 for number in importer.buffers)])
        importer.buffers[buffer] = content
        data.buffer_views.append(BufferView.from_dict({"buffer": buffer, "byteLength": len(content)}))
        accessor = {"bufferView": len(data.buffer_views) - 1, "componentType": 5125, "type": "SCALAR"}
        data.accessors.append(Accessor.from_dict(accessor | {"count": faces.size}))
        return len(data.accessors) - 1
