"""Conversion of PLY files whose colors or faces would be lost by Blender's importer.

| file                                           | Blender's importer    | result of this module         |
|------------------------------------------------|-----------------------|-------------------------------|
| nonstandard color or texture coordinate names  | gray                  | recognized                    |
| face colors                                    | gray                  | the colors                    |
| ``TextureFile`` with UVs of vertices or faces  | gray                  | the texture                   |
| several ``TextureFile`` comments               | gray                  | counted as missing textures   |
| ``int`` colors in the range [0, 255]           | black                 | the colors                    |
| non-finite positions in binary files           | moved to the origin   | rejected                      |
| face with an out-of-range vertex index         | face is removed       | rejected                      |
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.assets.file_types import FileTypeError
from data_tools.assets.obj_materials import find_file

_COLORS = {
    spelling: color
    for color, letter in ((b"red", b"r"), (b"green", b"g"), (b"blue", b"b"), (b"alpha", b"a"))
    for spelling in (color, b"diffuse_" + color, letter, b"vertex_" + color, b"color_" + letter)
}

_PROPERTIES = _COLORS | {b"u": b"s", b"v": b"t", b"texture_u": b"s", b"texture_v": b"t"}

_TYPES = {
    name: code
    for names, code in (
        (b"char int8", "i1"), (b"uchar uint8", "u1"), (b"short int16", "i2"), (b"ushort uint16", "u2"),
        (b"int int32", "i4"), (b"uint uint32", "u4"), (b"float float32", "f4"), (b"double float64", "f8"),
    )
    for name in names.split()
}  # fmt: skip

_NAMES = {code: name.decode() for name, code in _TYPES.items()}

_RGB = ("red", "green", "blue")

#: Types of color properties that Blender's importer does not scale to [0, 1].
_UNSCALED = ("i1", "i2", "i4", "u4")


@dataclass(frozen=True)
class _Element:
    """Element of a PLY header.

    Attributes:
        count: Number of rows.
        properties: Mapping from property names to (type, type of the list length). The second item is "" for scalars.
    """

    count: int
    properties: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class _Lists:
    """Values of a list property.

    Attributes:
        lengths: Length of the list in each row, shape (rows,).
        values: Concatenated values of all rows, shape (sum of lengths,).
    """

    lengths: npt.NDArray[np.int64]
    values: npt.NDArray[np.generic]


_Columns = dict[str, npt.NDArray[np.generic] | _Lists]


def prepare_ply(path: Path, scratch: Path) -> tuple[Path, str, list[str]]:
    """Convert a PLY to a file that Blender's importer reads completely.

    Properties for colors and texture coordinates are renamed to the names that the importer expects, and all line ends
    are replaced by line feeds. If faces have colors or texture coordinates, each corner of a face becomes a separate
    vertex, to which these values are copied.

    Args:
        path: Path of the PLY.
        scratch: Folder for the converted file.

    Returns:
        A tuple (file, texture, lost). ``file`` is ``path`` if no conversion is required. ``texture`` is relative to the
        folder of ``path``, or "" if there is no texture. ``lost`` contains the names of missing textures and of
        properties that cannot be converted.

    Raises:
        FileTypeError: A position is not finite, or a face has an out-of-range vertex index.
    """
    content = path.read_bytes()
    end = re.search(rb"end_header[ \t]*(\r\n|\r|\n)", content[: 1 << 20])
    if end is None:
        return path, "", []
    header, body = content[: end.end()], content[end.end() :]
    is_text = b"format ascii" in header
    lines, elements, textures = _parse(header)
    if is_text and b"\r" in body:
        body = re.sub(rb"\r\n|\r", b"\n", body)
    order = "" if is_text else ">" if b"binary_big_endian" in header else "<"
    table = _read(elements, body, order)
    if table:
        _check(table)
    vertices, faces = (elements[name].properties if name in elements else {} for name in ("vertex", "face"))
    face_colors = faces.keys() >= set(_RGB) and not vertices.keys() >= set(_RGB)
    face_uvs, vertex_uvs = "texcoord" in faces, vertices.keys() >= {"s", "t"}
    if not face_uvs and not vertex_uvs:
        textures = []  # a texture has no effect if there are no texture coordinates
    found = find_file(path.parent, textures[0]) if len(textures) == 1 else None
    lost = textures if textures and not found else []
    written = b"\n".join(lines) + b"\n" + body
    has_face_uvs = face_uvs and not vertex_uvs and found is not None
    added = ("texcoord",) if has_face_uvs else _RGB if face_colors else ()
    unscaled = [name for name in (*_RGB, "alpha") if table and vertices.get(name, ("",))[0] in _UNSCALED]
    for name in unscaled:
        table["vertex"][name] = np.asarray(table["vertex"][name]).clip(0, 255).astype(np.uint8)
        vertices[name] = ("u1", "")
    if added or unscaled:
        if corners := _split_corners(elements, table, added):
            written = corners
        else:
            found, lost = None, [*lost, f"{path.name}: {added[0] if added else 'color'} of faces"]
    readable = path
    if written != content:
        readable = scratch / "readable.ply"
        readable.write_bytes(written)
    return readable, os.path.relpath(found, path.parent) if found else "", lost


def _parse(header: bytes) -> tuple[list[bytes], dict[str, _Element], list[str]]:
    """Return the header lines with standard property names, the elements, and the texture files."""
    lines, textures, elements, last = list[bytes](), list[str](), dict[str, _Element](), ""
    for line in re.split(rb"\r\n|\r|\n", header.rstrip(b"\r\n")):
        words = line.split()
        if words[:1] == [b"element"] and len(words) == 3 and words[2].isdigit():
            last = os.fsdecode(words[1])
            elements[last] = _Element(int(words[2]), {})
        if words[:1] == [b"property"] and last and len(words) > 2:
            name = _PROPERTIES.get(words[-1].lower(), words[-1])
            types = [_TYPES.get(word, "") for word in words[1:-1] if word != b"list"]
            properties, key = elements[last].properties, os.fsdecode(name)
            key = key if key not in properties else f"{key} {len(properties)}"
            properties[key] = (types[-1], types[0] if len(types) > 1 else "")
            line = b" ".join([*words[:-1], name]) if last == "vertex" else line
        if found := re.fullmatch(rb"\s*comment\s+texturefile\s+(\S.*?)\s*", line, re.IGNORECASE):
            textures.append(os.fsdecode(found[1]))
        lines.append(line)
    return lines, elements, textures


def _read(elements: dict[str, _Element], body: bytes, order: str) -> dict[str, _Columns]:
    """Read all elements of a PLY.

    Args:
        elements: Elements of the header.
        body: Data after the header.
        order: Byte order in the notation of NumPy, or "" for an ASCII file.

    Returns:
        Mapping from element names to columns. If the data is invalid, it is empty, so that Blender's importer reports
        the error.
    """
    table, at = dict[str, _Columns](), 0
    data = body if order else np.fromstring(body.decode("latin-1"), np.float64, sep=" ").tobytes()
    try:
        for name, element in elements.items():
            types = {key: ("<f8", "<f8" if length else "") for key, (_, length) in element.properties.items()}
            if order:
                types = {
                    key: (order + dtype, length and order + length)
                    for key, (dtype, length) in element.properties.items()
                }
            table[name], at = _rows(element.count, types, data, at)
    except (ValueError, IndexError, TypeError):
        return {}
    return table


def _rows(count: int, types: dict[str, tuple[str, str]], data: bytes, at: int) -> tuple[_Columns, int]:
    """Read the rows of an element. If the lists have the same lengths in all rows, the rows are read in one operation.

    Args:
        count: Number of rows.
        types: Mapping from property names to NumPy types (type, type of the list length).
        data: Data of all elements.
        at: Offset of the first row in bytes.

    Returns:
        The columns, and the offset after the last row.
    """
    first = _row(types, data, at)[0] if count else {}
    lengths = {key: len(value) for key, value in first.items()}
    fields = list[tuple[str, str] | tuple[str, str, tuple[int]]]()
    for key, (dtype, length) in types.items():
        fields += (
            [(f"{key} length", length), (key, dtype, (lengths.get(key, 0),))] if length else [(key, dtype)]
        )
    layout = np.dtype(fields)
    if count * layout.itemsize <= len(data) - at:
        rows = np.frombuffer(data, layout, count, at)
        lists = [key for key, (_, length) in types.items() if length]
        if all((rows[f"{key} length"] == lengths.get(key, 0)).all() for key in lists):
            uniform: _Columns = {
                key: _Lists(np.full(count, lengths.get(key, 0)), rows[key].reshape(-1))
                if key in lists
                else rows[key]
                for key in types
            }
            return uniform, at + rows.nbytes
    each = list[dict[str, npt.NDArray[np.generic]]]()
    for _ in range(count):
        row, at = _row(types, data, at)
        each.append(row)
    columns: _Columns = {}
    for key, (_, list_length) in types.items():
        values = np.concatenate([row[key] for row in each])
        columns[key] = _Lists(np.array([len(row[key]) for row in each]), values) if list_length else values
    return columns, at


def _row(
    types: dict[str, tuple[str, str]], data: bytes, at: int
) -> tuple[dict[str, npt.NDArray[np.generic]], int]:
    row = {}
    for key, (dtype, length) in types.items():
        count = 1
        if length:
            count = int(np.frombuffer(data, length, 1, at)[0])
            at += np.dtype(length).itemsize
        row[key] = np.frombuffer(data, dtype, count, at)
        at += row[key].nbytes
    return row, at


def _check(table: dict[str, _Columns]) -> None:
    """Reject positions and faces that Blender's importer would change without an error."""
    vertex, face = table.get("vertex", {}), table.get("face", {})
    positions = [vertex[axis] for axis in "xyz" if axis in vertex]
    for values in positions:
        with np.errstate(over="ignore"):
            if not np.isfinite(np.asarray(values, np.float32)).all():
                raise FileTypeError(
                    expected="finite float32 vertex positions",
                    found="NaN or infinity",
                    remedy="export the mesh again",
                )
    corners = _corners(face)
    if corners and positions and len(corners.values):
        count = len(np.asarray(positions[0]))
        low, high = int(corners.values.min()), int(corners.values.max())
        if low < 0 or high >= count:
            raise FileTypeError(
                expected=f"vertex indices from 0 to {count - 1}",
                found=low if low < 0 else high,
                remedy="export the mesh again",
            )


def _corners(face: _Columns) -> _Lists | None:
    lists = [face[key] for key in ("vertex_indices", "vertex_index") if key in face]
    return lists[0] if lists and isinstance(lists[0], _Lists) else None


def _split_corners(elements: dict[str, _Element], table: dict[str, _Columns], added: Sequence[str]) -> bytes:
    """Encode a PLY with a separate vertex for each corner of a face.

    Args:
        elements: Elements of the header.
        table: Mapping from element names to columns.
        added: Names of face properties that are copied to the vertices.

    Returns:
        Content of the PLY, or b"" if the faces cannot be converted.
    """
    vertex, face = table.get("vertex", {}), table.get("face", {})
    corners = _corners(face)
    if corners is None:
        return b""
    at, faces = corners.values.astype(np.int64), np.repeat(np.arange(len(corners.lengths)), corners.lengths)
    columns = {
        key: np.asarray(values)[at] for key, values in vertex.items() if not isinstance(values, _Lists)
    }
    types = {key: elements["vertex"].properties[key][0] for key in columns}
    for key in added:
        values, dtype = face[key], elements["face"].properties[key][0]
        if not isinstance(values, _Lists):
            columns[key], types[key] = values[faces], dtype
        elif np.array_equal(values.lengths, 2 * corners.lengths):
            columns |= {"s": values.values[::2], "t": values.values[1::2]}
            types |= {"s": dtype, "t": dtype}
        else:
            return b""
    return _encode(columns, types, corners.lengths)


def _encode(
    columns: dict[str, npt.NDArray[np.generic]], types: dict[str, str], lengths: npt.NDArray[np.int64]
) -> bytes:
    """Encode a PLY whose faces use consecutive vertices."""
    rows = np.empty(int(lengths.sum()), [(key, "<" + dtype) for key, dtype in types.items()])
    for key, values in columns.items():
        rows[key] = values
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    header += [f"property {_NAMES[dtype]} {key}" for key, dtype in types.items()]
    header += [f"element face {len(lengths)}", "property list uint uint vertex_indices", "end_header"]
    heads = np.cumsum(lengths) - lengths + np.arange(len(lengths))
    indices = np.empty(len(rows) + len(lengths), "<u4")
    is_length = np.zeros(len(indices), bool)
    is_length[heads] = True
    indices[is_length], indices[~is_length] = lengths, np.arange(len(rows))
    return "\n".join(header).encode() + b"\n" + rows.tobytes() + indices.tobytes()
