"""What a file is by its first bytes: a mesh of its suffix's kind, or something that a server sent in its place."""

import struct
from pathlib import Path

from lrm_pl.errors import InputError

#: Bytes that are enough to tell.
HEAD_BYTES = 4096

_OBJ_WORDS = frozenset(b"mtllib usemtl v vn vt vp o g s f l p mg".split())


class KindError(InputError):
    """A file is not of the kind that it should be; the message says what it began with."""


def check_head(suffix: str, head: bytes, where: str) -> None:
    """Check the first bytes of a file.

    Args:
        suffix: Its suffix (".glb"), which says what it should be; others than meshes, zips and gzips are not looked at.
        head: Its first bytes, at least ``HEAD_BYTES`` where it has as many.
        where: What messages call it.

    Raises:
        KindError: It is of another kind.
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
        raise KindError(
            f"{where}: expected {kind[1:]}, found a file that begins with {_shown(head)}; "
            "look at what is there, it may be the message of a server"
        )


def check_kind(path: Path, where: str, suffix: str | None = None) -> None:
    """Check a whole file: its first bytes, and the length that a GLB says it has.

    Args:
        path: The file.
        where: What messages call it.
        suffix: What it should be; None takes its own suffix.

    Raises:
        KindError: It is of another kind, or cut off.
    """
    kind = (path.suffix if suffix is None else suffix).lower()
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    check_head(kind, head, where)
    size = path.stat().st_size
    if kind == ".glb":
        length = struct.unpack_from("<I", head, 8)[0] if len(head) >= 12 else 12
        if length != size:
            raise KindError(
                f"{where}: expected {length} bytes as its header says, found {size}; get it again"
            )
    if kind == ".gltf" and b'"asset"' not in path.read_bytes():
        raise KindError(
            f"{where}: expected gltf, found JSON without an asset that begins with {_shown(head)}; "
            "look at what is there, it may be the message of a server"
        )


def _begins_like_obj(text: bytes) -> bool:
    lines = [line for line in text.split(b"\n") if line.strip() and not line.lstrip().startswith(b"#")]
    return text.startswith(b"#") if not lines else lines[0].split()[0] in _OBJ_WORDS


def _shown(head: bytes) -> str:
    if not head:
        return "nothing: it is empty"
    return repr(head[:60].decode("utf-8", "replace"))
