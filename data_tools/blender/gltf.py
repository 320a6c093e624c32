"""Correction of glTF files that Blender's importer does not read as the format specifies.

``data_tools/blender/README.md`` lists the corrections. The module requires ``bpy``.
"""

import contextlib
import copy
import json
import re
import struct
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import bpy
import numpy as np

from data_tools.assets.asset_list import AssetError

GLTF_SUFFIXES = (".glb", ".gltf")

#: Cosine of the angle between two axes above which a matrix is treated as sheared. Rounding errors are smaller.
_SHEARED = 1e-4


@contextlib.contextmanager
def _invalid_file_errors() -> Iterator[None]:
    """Convert exceptions caused by an invalid file to ``AssetError``."""
    try:
        yield
    except AssetError:
        raise
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise AssetError(expected="a valid glTF 2.0 file", found=repr(error)) from error


@_invalid_file_errors()
def external_uris(path: Path) -> list[str]:
    """Return the decoded URIs of the external buffers and images of a glTF file.

    Raises:
        AssetError: The file is invalid or a glTF 1.0 file.
    """
    record = _read_json(path)
    if str(record.get("asset", {}).get("version", "2.0")).startswith("1."):
        raise AssetError(expected="glTF 2.0", found="version 1.0", remedy="convert the file to glTF 2.0")
    return [unquote(entry["uri"]) for entry in _external_entries(record)]


def _external_entries(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the buffers and images that are stored in separate files.

    Blender's importer treats all URIs except base64 data as paths.
    """
    return [
        entry
        for entry in (*record.get("buffers", ()), *record.get("images", ()))
        if (uri := entry.get("uri")) and not (uri.startswith("data:") and ";base64," in uri)
    ]


def _read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read a glTF file, or the JSON chunk of a binary glTF file (glTF 2.0 specification, section 4.4)."""
    if path.suffix.lower() != ".glb":
        return json.loads(path.read_bytes())
    with open(path, "rb") as file:
        head = file.read(20)
        if len(head) < 20 or head[:4] != b"glTF":
            raise AssetError(expected="a binary glTF file", found="another file type")
        _, version, _, size, _ = struct.unpack("<4s4I", head)
        if version != 2:
            raise AssetError("glTF 2.0", f"version {version}.0", "convert the file to glTF 2.0")
        return json.loads(file.read(size))


@_invalid_file_errors()
def prepare_gltf(path: Path, scratch: Path) -> Path:
    """Correct the JSON of a glTF file for Blender's importer.

    Args:
        path: Path of the file.
        scratch: Folder for the corrected file.

    Returns:
        Path of the corrected file, or ``path`` if no correction is required.

    Raises:
        AssetError: The file is not a valid glTF 2.0 file.
    """
    record = _read_json(path)
    before = copy.deepcopy(record)
    for primitive in (one for mesh in record.get("meshes", ()) for one in mesh["primitives"]):
        _correct_attributes(primitive, record)
    _split_sheared_nodes(record)
    if record == before:
        return path
    for entry in _external_entries(record):
        # Paths in the corrected file are absolute, so that they refer to the files that were checked.
        entry["uri"] = quote(str(path.parent.absolute() / unquote(entry["uri"])))
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


def _correct_attributes(primitive: dict[str, Any], record: dict[str, Any]) -> None:
    """Correct the attributes of a primitive.

    Custom attributes are removed. If a set of texture coordinates is missing, the last set is used instead. If the
    primitive has vertex colors and no material, the default material is assigned.
    """
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
    """Split nodes with a sheared matrix into two nodes without shear, by singular value decomposition."""
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

    Args:
        file: Path of the file.

    Returns:
        Status of Blender's import operator, for example, {"FINISHED"}.

    Raises:
        AssetError: A vertex position is not finite, or the data of a mesh is invalid.
    """
    hooks = _Hooks()
    addon = sys.modules["io_scene_gltf2"]
    addon.glTF2ImportUserExtension = lambda: hooks  # type: ignore[attr-defined]  # from which the importer takes the hooks
    outcome = set(bpy.ops.import_scene.gltf(filepath=file, disable_bone_shape=True))
    if hooks.errors:
        raise AssetError(hooks.errors[0], remedy="export the mesh again")
    return outcome


class _Hooks:
    """User extension of Blender's glTF importer.

    Attributes:
        errors: Messages about invalid meshes, which the importer would change without an error.
    """

    extensions = (types.SimpleNamespace(name="KHR_node_visibility", required=True),)

    def __init__(self) -> None:
        self.errors = list[str]()
        self._hidden: set[int] | None = None

    def gather_import_node_after_hook(
        self,
        vnode: types.SimpleNamespace,
        _: object,
        obj: bpy.types.Object,
        importer: types.SimpleNamespace,
    ) -> None:
        """Hide an object if its node or an ancestor of its node is not visible."""
        if self._hidden is None:
            self._hidden = self._find_hidden(importer.data.nodes)
        if {vnode.mesh_node_idx, vnode.parent} & self._hidden:
            obj.hide_render = True

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
        """Record non-finite vertex positions, and move duplicate faces to a new primitive.

        The importer would remove faces that have the same vertices as an earlier face of the primitive.
        """
        try:
            for primitive in list(mesh.primitives):
                if "KHR_draco_mesh_compression" not in (primitive.extensions or {}):
                    self._check_primitive(primitive, mesh, importer)
        except Exception as error:  # the importer would ignore the exception
            self.errors.append(f"mesh {mesh.name!r} cannot be read: {error!r}")

    def _check_primitive(
        self, primitive: types.SimpleNamespace, mesh: types.SimpleNamespace, importer: types.SimpleNamespace
    ) -> None:
        from io_scene_gltf2.io.imp.gltf2_io_binary import BinaryData

        decode: Callable[..., Any] = BinaryData.decode_accessor
        if "POSITION" in primitive.attributes:
            positions = decode(importer, primitive.attributes["POSITION"])
            if not np.isfinite(positions).all():
                self.errors.append(f"vertex positions of mesh {mesh.name!r} are not finite")
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
        """Record meshes that could not be decompressed, because the importer skips them without an error."""
        used = [primitive.attributes.get("POSITION"), primitive.indices]
        if "KHR_draco_mesh_compression" in (primitive.extensions or {}) and any(
            importer.data.accessors[one].buffer_view is None for one in used if one is not None
        ):
            self.errors.append(f"Draco data of mesh {mesh.name!r} are invalid")

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
