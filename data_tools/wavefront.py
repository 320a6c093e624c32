"""What an OBJ is coloured with, read without Blender: the materials that its faces use, their colours and textures."""

import dataclasses
import posixpath
import re
from collections.abc import Callable, Iterator

#: A file beside the OBJ -> its bytes; None where there is none. Paths are relative to the OBJ's folder.
Read = Callable[[str], bytes | None]


@dataclasses.dataclass(frozen=True)
class Surface:
    """The files and the colours that the faces of one OBJ show.

    Attributes:
        libraries: MTL files that it names, in order; relative to the OBJ's folder.
        textures: Pictures of colour and of opacity of the materials in use; relative to the OBJ's folder.
        colours: Colours (``Kd``, as written) of the materials in use that have no picture.
        missing: Those of ``libraries`` and ``textures`` that are not there, or lie outside the folder.
    """

    libraries: tuple[str, ...]
    textures: tuple[str, ...]
    colours: frozenset[str]
    missing: tuple[str, ...]


def read_surface(obj: bytes, read: Read) -> Surface:
    """Find out what an OBJ is coloured with.

    Args:
        obj: Content of the OBJ.
        read: Gives the files beside it.
    """
    names = [
        _text(name.rstrip()) for name in re.findall(rb"^[ \t]*mtllib[ \t]+(\S[^\r\n]*)", obj, re.MULTILINE)
    ]
    used = {
        _text(name.rstrip()) for name in re.findall(rb"^[ \t]*usemtl[ \t]+(\S[^\r\n]*)", obj, re.MULTILINE)
    }
    libraries = tuple(dict.fromkeys(posixpath.normpath(name) for name in names))
    missing, colours, pictures = [], dict[str, str](), dict[str, list[str]]()
    for library in libraries:
        content = None if leaves(library) else read(library)
        if content is None:
            missing.append(library)
            continue
        for material, key, value in _statements(_text(content)):
            if key == "kd":
                colours[material] = " ".join(value.split())
            elif key in ("map_kd", "map_d"):
                name = posixpath.join(posixpath.dirname(library), _without_options(value))
                pictures.setdefault(material, []).append(posixpath.normpath(name))
    textures = tuple(dict.fromkeys(name for key in sorted(used) for name in pictures.get(key, ())))
    missing += [name for name in textures if leaves(name) or read(name) is None]
    plain = frozenset(colours.get(key, "") for key in used if key not in pictures)
    return Surface(libraries, textures, plain, tuple(missing))


def leaves(path: str) -> bool:
    """Say whether a relative path, once it is followed, ends outside the folder it is relative to."""
    return path.startswith("/") or ".." in path.split("/") or "\\" in path or ":" in path


def _statements(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (material, lower-case keyword, rest of the line) of an MTL."""
    material = ""
    for line in text.splitlines():
        keyword, *rest = line.strip().split(maxsplit=1)[:2] or [""]
        if rest and keyword.lower() == "newmtl":
            material = rest[0]
        elif rest:
            yield material, keyword.lower(), rest[0]


def _without_options(value: str) -> str:
    """Drop options before a texture's name: ``-s 2 2 1 -bm 0.03 wood grain.jpg`` -> ``wood grain.jpg``."""
    return re.sub(r"^(-\w+( +(on|off|[-+.\d]+(e[-+]?\d+)?))* +)+", "", value)


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="surrogateescape")
