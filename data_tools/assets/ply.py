"""A PLY as Blender's importer reads it: read and written again without Blender where the importer loses something.

| the file says                                  | Blender               | here                          |
|------------------------------------------------|-----------------------|-------------------------------|
| other names of colors and texture coordinates  | gray                  | read                          |
| colors of faces                                | gray                  | the colors                    |
| ``TextureFile``, laid on by vertices or faces  | gray                  | the image                   |
| the same with several images                 | gray                  | counted as missing            |
| colors in 0 to 255 as ``int``                  | black                 | the colors                    |
| positions that are not finite, in binary       | the origin            | refused                       |
| a face with a vertex that is not there         | without that face     | refused                       |
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

#: Types of colors that Blender's importer does not scale.
_UNSCALED = ("i1", "i2", "i4", "u4")


@dataclass(frozen=True)
class _Element:
    """Rows of one kind: their number, and name -> (type, type of the length of a list, "" where it is none)."""

    count: int
    properties: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class _Lists:
    """A list a row, one after another."""

    lengths: npt.NDArray[np.int64]
    values: npt.NDArray[np.generic]


_Columns = dict[str, npt.NDArray[np.generic] | _Lists]


def prepare_ply(path: Path, scratch: Path) -> tuple[Path, str, list[str]]:
    """Return a PLY as Blender's importer reads it.

    That is with the usual names of colors and texture coordinates, with line feeds, and with what faces have of colors
    and texture coordinates at vertices, of which each corner then has its own.

    Args:
        path: The file.
        scratch: Where a copy is written if one is needed.

    Returns:
        The file; the image that lies on it, "" where there is none; and what of its colors is lost.

    Raises:
        FileTypeError: A position is no number, or a face has a corner that is not there.
    """
    content = path.read_bytes()
    end = re.search(rb"end_header[ \t]*(\r\n|\r|\n)", content[: 1 << 20])
    if end is None:
        return path, "", []
    header, body = content[: end.end()], content[end.end() :]
    is_text = b"format ascii" in header
    renamed, elements, textures = _parse(header)
    if is_text and b"\r" in body:
        body = re.sub(rb"\r\n|\r", b"\n", body)
    order = "" if is_text else ">" if b"binary_big_endian" in header else "<"
    table = _read(elements, body, order)
    if table:
        _check(table)
    vertices, faces = (elements[name].properties if name in elements else {} for name in ("vertex", "face"))
    colors_faces = faces.keys() >= set(_RGB) and not vertices.keys() >= set(_RGB)
    lays_faces, lays_vertices = "texcoord" in faces, vertices.keys() >= {"s", "t"}
    if not lays_faces and not lays_vertices:
        textures = []  # the comment is left over
    found = find_file(path.parent, textures[0]) if len(textures) == 1 else None
    lost = textures if textures and not found else []
    written = b"\n".join(renamed) + b"\n" + body
    is_laid = lays_faces and not lays_vertices and found is not None
    added = ("texcoord",) if is_laid else _RGB if colors_faces else ()
    unscaled = [name for name in (*_RGB, "alpha") if table and vertices.get(name, ("",))[0] in _UNSCALED]
    for name in unscaled:
        table["vertex"][name] = np.asarray(table["vertex"][name]).clip(0, 255).astype(np.uint8)
        vertices[name] = ("u1", "")
    if added or unscaled:
        if corners := _by_corners(elements, table, added):
            written = corners
        else:
            found, lost = None, [*lost, f"{path.name}: {added[0] if added else 'color'} of faces"]
    readable = path
    if written != content:
        readable = scratch / "readable.ply"
        readable.write_bytes(written)
    return readable, os.path.relpath(found, path.parent) if found else "", lost


def _parse(header: bytes) -> tuple[list[bytes], dict[str, _Element], list[str]]:
    """Return the lines of a header with usual names, its elements, and the images that it names."""
    renamed, textures, elements, last = list[bytes](), list[str](), dict[str, _Element](), ""
    for line in re.split(rb"\r\n|\r|\n", header.rstrip(b"\r\n")):
        words = line.split()
        if words[:1] == [b"element"] and len(words) == 3 and words[2].isdigit():
            last = os.fsdecode(words[1])
            elements[last] = _Element(int(words[2]), {})
        if words[:1] == [b"property"] and last and len(words) > 2:
            name = _PROPERTIES.get(words[-1].lower(), words[-1])
            kinds = [_TYPES.get(word, "") for word in words[1:-1] if word != b"list"]
            properties, key = elements[last].properties, os.fsdecode(name)
            key = key if key not in properties else f"{key} {len(properties)}"
            properties[key] = (kinds[-1], kinds[0] if len(kinds) > 1 else "")
            line = b" ".join([*words[:-1], name]) if last == "vertex" else line
        if found := re.fullmatch(rb"\s*comment\s+texturefile\s+(\S.*?)\s*", line, re.IGNORECASE):
            textures.append(os.fsdecode(found[1]))
        renamed.append(line)
    return renamed, elements, textures


def _read(elements: dict[str, _Element], body: bytes, order: str) -> dict[str, _Columns]:
    """Read vertices and faces; nothing where that is not possible: Blender's importer then says why.

    Args:
        elements: What the header says.
        body: What follows it.
        order: Sequence of the bytes, as NumPy writes it; "" for text.
    """
    table, at = dict[str, _Columns](), 0
    data = body if order else np.fromstring(body.decode("latin-1"), np.float64, sep=" ").tobytes()
    try:
        for name, element in elements.items():
            kinds = {key: ("<f8", "<f8" if length else "") for key, (_, length) in element.properties.items()}
            if order:
                kinds = {
                    key: (order + kind, length and order + length)
                    for key, (kind, length) in element.properties.items()
                }
            table[name], at = _rows(element.count, kinds, data, at)
    except (ValueError, IndexError, TypeError):
        return {}
    return table


def _rows(count: int, kinds: dict[str, tuple[str, str]], data: bytes, at: int) -> tuple[_Columns, int]:
    """Read the rows of an element: at once where all lists are as long as in the first row."""
    first = _row(kinds, data, at)[0] if count else {}
    lengths = {key: len(value) for key, value in first.items()}
    fields = list[tuple[str, str] | tuple[str, str, tuple[int]]]()
    for key, (kind, length) in kinds.items():
        fields += (
            [(f"{key} length", length), (key, kind, (lengths.get(key, 0),))] if length else [(key, kind)]
        )
    layout = np.dtype(fields)
    if count * layout.itemsize <= len(data) - at:
        rows = np.frombuffer(data, layout, count, at)
        lists = [key for key, (_, length) in kinds.items() if length]
        if all((rows[f"{key} length"] == lengths.get(key, 0)).all() for key in lists):
            uniform: _Columns = {
                key: _Lists(np.full(count, lengths.get(key, 0)), rows[key].reshape(-1))
                if key in lists
                else rows[key]
                for key in kinds
            }
            return uniform, at + rows.nbytes
    each = list[dict[str, npt.NDArray[np.generic]]]()
    for _ in range(count):
        row, at = _row(kinds, data, at)
        each.append(row)
    columns: _Columns = {}
    for key, (_, list_length) in kinds.items():
        values = np.concatenate([row[key] for row in each])
        columns[key] = _Lists(np.array([len(row[key]) for row in each]), values) if list_length else values
    return columns, at


def _row(
    kinds: dict[str, tuple[str, str]], data: bytes, at: int
) -> tuple[dict[str, npt.NDArray[np.generic]], int]:
    row = {}
    for key, (kind, length) in kinds.items():
        count = 1
        if length:
            count = int(np.frombuffer(data, length, 1, at)[0])
            at += np.dtype(length).itemsize
        row[key] = np.frombuffer(data, kind, count, at)
        at += row[key].nbytes
    return row, at


def _check(table: dict[str, _Columns]) -> None:
    """Refuse what Blender's importer moves to the origin or leaves out without a word."""
    vertex, face = table.get("vertex", {}), table.get("face", {})
    positions = [vertex[axis] for axis in "xyz" if axis in vertex]
    for values in positions:
        with np.errstate(over="ignore"):
            if not np.isfinite(np.asarray(values, np.float32)).all():
                raise FileTypeError(
                    expected="finite vertex positions of float32",
                    found="NaN or infinity",
                    remedy="export the mesh again",
                )
    corners = _corners(face)
    if corners and positions and len(corners.values):
        count = len(np.asarray(positions[0]))
        low, high = int(corners.values.min()), int(corners.values.max())
        if low < 0 or high >= count:
            raise FileTypeError(
                expected=f"faces between its {count} vertices",
                found=f"one with vertex {(low if low < 0 else high)}",
                remedy="mend it in the program that made it",
            )


def _corners(face: _Columns) -> _Lists | None:
    lists = [face[key] for key in ("vertex_indices", "vertex_index") if key in face]
    return lists[0] if lists and isinstance(lists[0], _Lists) else None


def _by_corners(elements: dict[str, _Element], table: dict[str, _Columns], added: Sequence[str]) -> bytes:
    """Write a PLY of which each corner of a face is a vertex of its own; nothing where faces do not fit.

    Args:
        elements: What the header says.
        table: What follows it.
        added: Properties of the faces that vertices get.
    """
    vertex, face = table.get("vertex", {}), table.get("face", {})
    corners = _corners(face)
    if corners is None:
        return b""
    at, faces = corners.values.astype(np.int64), np.repeat(np.arange(len(corners.lengths)), corners.lengths)
    columns = {
        key: np.asarray(values)[at] for key, values in vertex.items() if not isinstance(values, _Lists)
    }
    kinds = {key: elements["vertex"].properties[key][0] for key in columns}
    for key in added:
        values, kind = face[key], elements["face"].properties[key][0]
        if not isinstance(values, _Lists):
            columns[key], kinds[key] = values[faces], kind
        elif np.array_equal(values.lengths, 2 * corners.lengths):
            columns |= {"s": values.values[::2], "t": values.values[1::2]}
            kinds |= {"s": kind, "t": kind}
        else:
            return b""
    return _written(columns, kinds, corners.lengths)


def _written(
    columns: dict[str, npt.NDArray[np.generic]], kinds: dict[str, str], lengths: npt.NDArray[np.int64]
) -> bytes:
    """Write a PLY whose faces take one vertex after another."""
    rows = np.empty(int(lengths.sum()), [(key, "<" + kind) for key, kind in kinds.items()])
    for key, values in columns.items():
        rows[key] = values
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    header += [f"property {_NAMES[kind]} {key}" for key, kind in kinds.items()]
    header += [f"element face {len(lengths)}", "property list uint uint vertex_indices", "end_header"]
    heads = np.cumsum(lengths) - lengths + np.arange(len(lengths))
    indices = np.empty(len(rows) + len(lengths), "<u4")
    is_length = np.zeros(len(indices), bool)
    is_length[heads] = True
    indices[is_length], indices[~is_length] = lengths, np.arange(len(rows))
    return "\n".join(header).encode() + b"\n" + rows.tobytes() + indices.tobytes()
