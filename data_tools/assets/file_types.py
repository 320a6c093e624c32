"""What a file is by its first bytes: a mesh of its suffix's kind, or something that a server sent in its place."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from data_tools.assets.obj_materials import libraries
from lrm_pl.errors import InputError

#: Bytes that are enough to tell.
HEAD_BYTES = 4096

_OBJ_WORDS = frozenset(b"mtllib usemtl v vn vt vp o g s f l p mg".split())


class FileTypeError(InputError):
    """A file is not of the kind that it should be; the message says what it began with."""


def check_head(suffix: str, head: bytes, where: str) -> None:
    """Check the first bytes of a file.

    Args:
        suffix: Its suffix (".glb"), which says what it should be; others than meshes, zips and gzips are not looked at.
        head: Its first bytes, at least ``HEAD_BYTES`` where it has as many.
        where: What messages call it.

    Raises:
        FileTypeError: It is of another kind.
    """
    kind = suffix.lower()
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    fits = {
        ".glb": head.startswith(b"glTF"),
        ".gltf": text.startswith(b"{"),
        ".ply": head.startswith(b"ply"),
        ".fbx": head.startswith((b"Kaydara FBX Binary", b";")) or text.startswith(b"FBX"),
        ".obj": b"\0" not in head and _begins_like_obj(text),
        ".zip": head.startswith(b"PK"),
        ".gz": head.startswith(b"\x1f\x8b"),
    }
    if not fits.get(kind, True):
        raise FileTypeError(
            subject=where,
            expected=kind[1:],
            found=f"a file that begins with {_shown(head)}",
            remedy="look at what is there, it may be the message of a server",
        )


def check_file_type(path: Path, where: str, suffix: str | None = None) -> None:
    """Check a whole file: its first bytes, and the length that a GLB says it has.

    Args:
        path: The file.
        where: What messages call it.
        suffix: What it should be; None takes its own suffix.

    Raises:
        FileTypeError: It is of another kind, or cut off.
    """
    kind = (path.suffix if suffix is None else suffix).lower()
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    check_head(kind, head, where)
    size = path.stat().st_size
    if kind == ".glb":
        length = struct.unpack_from("<I", head, 8)[0] if len(head) >= 12 else 12
        if length != size:
            raise FileTypeError(
                subject=where,
                expected=f"{length} bytes as its header says",
                found=size,
                remedy="get it again",
            )
    if kind == ".gltf" and b'"asset"' not in path.read_bytes():
        raise FileTypeError(
            subject=where,
            expected="gltf",
            found=f"JSON without an asset that begins with {_shown(head)}",
            remedy="look at what is there, it may be the message of a server",
        )


def check_mesh_file(path: Path) -> None:
    """Refuse what importers read as something else without a word: empty files, web pages, UTF-16, positions of nan.

    Args:
        path: A mesh.

    Raises:
        FileTypeError: What it is.
    """
    kind = path.suffix.lower()
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.strip():
        raise FileTypeError(expected=kind[1:], found="nothing: it is empty", remedy="get it again")
    if head.lstrip().startswith(b"<"):
        raise FileTypeError(
            expected=kind[1:],
            found=f"a file that begins with {_shown(head)}",
            remedy="it may be the message of a server",
        )
    _refuse_utf16(path, head, kind in (".obj", ".gltf"))
    if kind == ".obj":
        content = path.read_bytes()
        for library in libraries(path, content)[0]:
            with open(library, "rb") as file:
                _refuse_utf16(library, file.read(HEAD_BYTES), True)
        _refuse_undefined(content, 1)
    elif kind == ".ply" and b"format ascii" in head:
        _refuse_undefined(path.read_bytes(), 0)


def _refuse_utf16(path: Path, head: bytes, is_text: bool) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (is_text and b"\0" in head):
        raise FileTypeError(
            expected=f"{path.name} to be text in UTF-8", found="UTF-16 or zeros", remedy="save it as UTF-8"
        )


def _refuse_undefined(content: bytes, first: int) -> None:
    """Refuse positions that no float32 holds, which importers take for 0; they are words ``first`` to ``first + 2``."""
    for at in _suspects(content):
        start = max(content.rfind(b"\n", 0, at), content.rfind(b"\r", 0, at)) + 1
        line = (content[start : start + 2000].splitlines() or [b""])[0]
        words = line.split()
        if (not first or words[:1] == [b"v"]) and any(map(_is_undefined, words[first : first + 3])):
            number = content.count(b"\n", 0, start) + 1
            raise FileTypeError(
                expected="finite vertex positions of float32",
                found=f"{_shown(line)} in line {number}",
                remedy="mend it in the program that made it",
            )


def _suspects(content: bytes) -> Iterator[int]:
    """Yield where there may be a number that is none, or too large, in order of what is found fast."""
    lower = content.lower()
    if any(word in lower for word in (b"nan", b"inf", b"#ind")):  # far faster than to search for all of them
        yield from (found.start() for found in re.finditer(rb"nan|inf|#ind", lower))
    yield from (found.start() for found in re.finditer(rb"e\+?0*(?:3[89]|[4-9]\d|\d{3})", lower))
    digits, long = content.translate(_DIGITS), b"0" * 39
    at = digits.find(long)
    while at >= 0:
        yield at
        at = digits.find(long, digits.find(b" ", at))


def _is_undefined(word: bytes) -> bool:
    try:
        return not abs(float(word)) <= _LARGEST
    except ValueError:
        return _UNDEFINED.fullmatch(word) is not None


#: As C libraries write it.
_UNDEFINED = re.compile(rb"[+-]?(nan(\(\w*\))?|inf(inity)?|1\.?#\w+)", re.IGNORECASE)

#: The largest float32.
_LARGEST = 3.4028235677973366e38

#: Every digit a 0, everything else a space.
_DIGITS = bytes(48 if chr(code).isdigit() and code < 128 else 32 for code in range(256))


def _begins_like_obj(text: bytes) -> bool:
    lines = [line for line in text.split(b"\n") if line.strip() and not line.lstrip().startswith(b"#")]
    return text.startswith(b"#") if not lines else lines[0].split()[0] in _OBJ_WORDS


def _shown(head: bytes) -> str:
    if not head:
        return "nothing: it is empty"
    return repr(head[:60].decode("utf-8", "replace"))
