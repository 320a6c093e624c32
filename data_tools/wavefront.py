"""What an OBJ is coloured with, read without Blender: the materials that its faces use, their colours and textures."""

import dataclasses
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

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
    used = {
        _text(name.rstrip()) for name in re.findall(rb"^[ \t]*usemtl[ \t]+(\S[^\r\n]*)", obj, re.MULTILINE)
    }
    libraries = tuple(dict.fromkeys(posixpath.normpath(name) for name in library_names(obj)))
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


@dataclasses.dataclass
class Material:
    """What an MTL says of a material, as far as Blender takes it otherwise.

    Attributes:
        by_blender: Whether Blender wrote the MTL: its colours are linear light.
        diffuse: ``Kd``, as written; None where it is not given as three numbers in [0, 1].
        illumination: ``illum``; None where it is not given.
        ambient_map: The picture of ``map_Ka``, where there is one and none of ``map_Kd``.
    """

    by_blender: bool
    diffuse: tuple[float, ...] | None = None
    illumination: int | None = None
    ambient_map: Path | None = None


def read_materials(obj: Path) -> tuple[dict[str, Material], list[str]]:
    """Read the MTL files that an OBJ names.

    Returns:
        The materials by name, and the MTL files that are not there.
    """
    materials, missing = dict[str, Material](), list[str]()
    for name in library_names(obj.read_bytes()):
        path = obj.parent / name.replace("\\", "/")
        if not path.is_file():
            missing.append(name)
            continue
        text = _text(path.read_bytes())
        by_blender, with_map = bool(re.match(r"#\s*Blender", text)), set[str]()
        for key, keyword, value in _statements(text):
            material = materials.setdefault(key, Material(by_blender))
            words = value.split()
            if (
                keyword == "kd"
                and len(words) == 3
                and all(re.fullmatch(r"[01]?\.?\d*(e-\d+)?", w) for w in words)
            ):
                colour = tuple(map(float, words))
                material.diffuse = colour if max(colour) <= 1 else None
            elif keyword == "illum" and words[0].isdecimal():
                material.illumination = int(words[0])
            elif keyword == "map_kd":
                with_map.add(key)
            elif keyword == "map_ka":
                picture = path.parent / _without_options(value).strip().replace("\\", "/")
                material.ambient_map = picture if picture.is_file() else None
        for key in with_map & materials.keys():
            materials[key].ambient_map = None
    return materials, missing


def library_names(obj: bytes) -> list[str]:
    """Return the MTL files that an OBJ names, as they are written."""
    found = re.findall(rb"^[ \t]*mtllib[ \t]+(\S[^\r\n]*)", obj, re.MULTILINE)
    return list(dict.fromkeys(_text(name.rstrip()) for name in found))


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
