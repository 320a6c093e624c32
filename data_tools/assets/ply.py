"""Conversion of PLY files whose colors or faces Blender's importer does not read correctly.

| Content of the PLY file                        | Blender's importer     | With this module             |
|------------------------------------------------|------------------------|------------------------------|
| Nonstandard color or texture coordinate names  | Object is gray         | Names are recognized         |
| Face colors                                    | Object is gray         | Colors are imported          |
| ``TextureFile`` with UVs of vertices or faces  | Object is gray         | Texture is imported          |
| Several ``TextureFile`` comments               | Object is gray         | Counted as missing textures  |
| ``int`` colors in the range [0, 255]           | Object is black        | Colors are imported          |
| Non-finite positions in a binary file          | Moved to the origin    | File is rejected             |
| Face with an out-of-range vertex index         | Face is removed        | File is rejected             |
"""

import functools
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_tools.assets.file_types import EXPORT_AGAIN, FileTypeError
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

#: Prefix of the fields for the lengths of lists. Property names do not contain spaces.
_LENGTH = "length of "

#: Minimum number of rows that are read together.
_MIN_ROWS = 8

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


class _Lists(NamedTuple):
    """Values of a list property.

    Attributes:
        lengths: Length of the list in each row, shape (rows,).
        values: Concatenated values of all rows, shape (sum of lengths,).
    """

    lengths: npt.NDArray[np.int64]
    values: npt.NDArray[np.generic]


@dataclass(frozen=True)
class _Columns:
    """Columns of an element, with the types that the header defines.

    Attributes:
        scalars: Mapping from names of scalar properties to the values, shape (rows,).
        lists: Mapping from names of list properties to the values.
    """

    scalars: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    lists: dict[str, _Lists] = field(default_factory=dict)

    @property
    def corners(self) -> _Lists | None:
        """Vertex indices of the corners of each face, or None if the element has no faces."""
        return self.lists.get("vertex_indices", self.lists.get("vertex_index"))


def prepare_ply(path: Path, scratch: Path) -> tuple[Path, str, list[str]]:
    """Convert a PLY to a file that Blender's importer reads completely.

    Properties for colors and texture coordinates are renamed to the names that the importer expects, and line endings
    are replaced with line feeds. If faces have colors or texture coordinates, each corner of a face becomes a separate
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
    table = _read(elements, body, "" if is_text else ">" if b"binary_big_endian" in header else "<")
    vertex, face = table.get("vertex", _Columns()), table.get("face", _Columns())
    _check(vertex, face)
    has_face_colors = face.scalars.keys() >= set(_RGB) and not vertex.scalars.keys() >= set(_RGB)
    has_vertex_uvs = vertex.scalars.keys() >= {"s", "t"}
    if not has_vertex_uvs and "texcoord" not in face.lists:
        textures = []  # a texture has no effect if there are no texture coordinates
    found = find_file(path.parent, textures[0]) if len(textures) == 1 else None
    lost = textures if textures and not found else []
    written = b"\n".join(lines) + b"\n" + body
    added = ("texcoord",) if found and not has_vertex_uvs else _RGB if has_face_colors else ()
    unscaled = [name for name in (*_RGB, "alpha") if _type(vertex.scalars.get(name)) in _UNSCALED]
    for name in unscaled:
        vertex.scalars[name] = vertex.scalars[name].clip(0, 255).astype(np.uint8)
    if added or unscaled:
        if corners := _split_corners(vertex, face, added):
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
        order: Byte order in NumPy notation, or "" for an ASCII file.

    Returns:
        Mapping from element names to columns. If the data is invalid, the mapping is empty, so that Blender's importer
        reports the error.
    """
    table, at = dict[str, _Columns](), 0
    data = body if order else np.fromstring(body.decode("latin-1"), np.float64, sep=" ").tobytes()
    try:
        for name, element in elements.items():
            parts, at = _read_rows(element, data, at, order)
            table[name] = _columns(element, parts)
    except (ValueError, TypeError, ArithmeticError):
        return {}
    return table


def _read_rows(element: _Element, data: bytes, at: int, order: str) -> tuple[list[npt.NDArray[np.void]], int]:
    """Read the rows of an element. Consecutive rows in which the lists have the same lengths are read together.

    Args:
        element: Element of the header.
        data: Data of all elements. All values of an ASCII file have the type float64.
        at: Offset of the first row in bytes.
        order: Byte order in NumPy notation, or "" for an ASCII file.

    Returns:
        Structured arrays of consecutive rows, and the offset after the last row.
    """
    lists = [_LENGTH + key for key, (_, length) in element.properties.items() if length]

    @functools.cache
    def layout(*lengths: int) -> np.dtype[np.void]:
        """Return the dtype of a row, up to the length field of the first list that is not covered by ``lengths``."""
        fields, given = list[tuple[str, str, tuple[int, ...]]](), iter(lengths)
        for key, (dtype, length) in element.properties.items():
            shape: tuple[int, ...] = ()
            if length:
                fields.append((_LENGTH + key, order + length if order else "<f8", ()))
                shape = tuple(itertools.islice(given, 1))
                if not shape:
                    break
            fields.append((key, order + dtype if order else "<f8", shape))
        return np.dtype(fields)

    parts, remaining, limit = list[npt.NDArray[np.void]](), element.count, _MIN_ROWS
    while remaining:
        lengths: tuple[int, ...] = ()
        for name in lists:
            lengths += (int(np.frombuffer(data, layout(*lengths), 1, at)[name][0]),)
        size = layout(*lengths).itemsize
        available = min(remaining, limit, (len(data) - at) // size)
        if not available:
            raise ValueError("truncated data")
        rows = np.frombuffer(data, layout(*lengths), available, at)
        same = np.ones(available, bool)
        for name in lists:
            same &= rows[name] == rows[name][0]
        count = available if same.all() else int(same.argmin())
        parts.append(rows[:count])
        remaining, at = remaining - count, at + count * size
        limit = 2 * limit if count == limit else _MIN_ROWS
    return parts, at


def _columns(element: _Element, parts: list[npt.NDArray[np.void]]) -> _Columns:
    columns = _Columns()
    for key, (dtype, length) in element.properties.items():
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.concatenate([np.empty(0), *(rows[key].ravel() for rows in parts)]).astype(dtype)
        if length:
            lengths = np.concatenate([np.empty(0), *(rows[_LENGTH + key] for rows in parts)])
            columns.lists[key] = _Lists(lengths.astype(np.int64), values)
        else:
            columns.scalars[key] = values
    return columns


def _check(vertex: _Columns, face: _Columns) -> None:
    """Reject positions and faces that Blender's importer would change without an error."""
    positions = [vertex.scalars[axis] for axis in "xyz" if axis in vertex.scalars]
    for values in positions:
        with np.errstate(over="ignore"):
            if not np.isfinite(values.astype(np.float32)).all():
                raise FileTypeError("finite float32 vertex positions", "NaN or infinity", EXPORT_AGAIN)
    if face.corners and positions and len(face.corners.values):
        low, high = int(face.corners.values.min()), int(face.corners.values.max())
        if low < 0 or high >= len(positions[0]):
            expected = f"vertex indices from 0 to {len(positions[0]) - 1}"
            raise FileTypeError(expected, low if low < 0 else high, EXPORT_AGAIN)


def _split_corners(vertex: _Columns, face: _Columns, added: Sequence[str]) -> bytes:
    """Encode a PLY with a separate vertex for each corner of a face.

    Args:
        vertex: Columns of the vertices.
        face: Columns of the faces.
        added: Names of face properties that are copied to the vertices.

    Returns:
        Content of the PLY, or b"" if the faces cannot be converted.
    """
    if face.corners is None:
        return b""
    lengths, indices = face.corners
    columns = {key: values[indices.astype(np.int64)] for key, values in vertex.scalars.items()}
    for key in added:
        if key in face.scalars:
            columns[key] = np.repeat(face.scalars[key], lengths)
        elif key in face.lists and np.array_equal(face.lists[key].lengths, 2 * lengths):
            columns |= {"s": face.lists[key].values[::2], "t": face.lists[key].values[1::2]}
        else:
            return b""
    return _encode(columns, lengths)


def _encode(columns: dict[str, npt.NDArray[np.generic]], lengths: npt.NDArray[np.int64]) -> bytes:
    """Encode a binary PLY in which the corners of the faces are consecutive vertices."""
    count = int(lengths.sum())
    rows = np.empty(count, [(key, "<" + _type(values)) for key, values in columns.items()])
    for key, values in columns.items():
        rows[key] = values
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [f"property {_NAMES[_type(values)]} {key}" for key, values in columns.items()]
    header += [f"element face {len(lengths)}", "property list uint uint vertex_indices", "end_header"]
    # The length of a face precedes the indices of the face.
    indices = np.insert(np.arange(count), np.cumsum(lengths) - lengths, lengths).astype("<u4")
    return "\n".join(header).encode() + b"\n" + rows.tobytes() + indices.tobytes()


def _type(values: npt.NDArray[np.generic] | None) -> str:
    """Return the type of a column without the byte order, for example, "f4"."""
    return "" if values is None else values.dtype.str[1:]
