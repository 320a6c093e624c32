"""What an OBJ is colored with, read without Blender: the materials that its faces use, their colors and textures."""

import dataclasses
import math
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

#: A file beside the OBJ -> its bytes; None where there is none. Paths are relative to the OBJ's folder.
Read = Callable[[str], bytes | None]

#: ``illum`` of materials that light passes through (the MTL format, section 5).
_GLASS = frozenset({"4", "6", "7", "9"})

#: ``illum`` of materials without highlights, whatever their ``Ks``.
_MATT = frozenset({"0", "1"})

#: Statements of numbers, after which a comment may follow; names of files may hold its sign.
_NUMBERS = frozenset({"ka", "kd", "ks", "ke", "tf", "ns", "ni", "d", "tr", "illum"})

#: Statements of pictures, beside those that begin with ``map_``.
_PICTURES = frozenset({"bump", "disp", "decal", "norm", "refl"})

#: As Blender spells what it reads; it tells upper from lower case.
_SPELLING = {
    name.lower(): name
    for name in (
        "Kd", "Ks", "Ke", "Ns", "Ni", "Tr", "Tf", "Pr", "Pm", "Ps", "Pc", "Pcr", "map_Kd", "map_Ks", "map_Ns", "map_Ke",
        "map_Bump", "map_Pr", "map_Pm", "map_Ps",
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ObjMaterials:
    """The files and the colors that the faces of one OBJ show.

    Attributes:
        libraries: MTL files that it names, in order; relative to the OBJ's folder.
        textures: Pictures of color and of opacity of the materials in use; relative to the OBJ's folder.
        colors: Colors (``Kd``, as written) of the materials in use that have no picture.
        missing: Those of ``libraries`` and ``textures`` that are not there, or lie outside the folder.
    """

    libraries: tuple[str, ...]
    textures: tuple[str, ...]
    colors: frozenset[str]
    missing: tuple[str, ...]


def read_obj_materials(obj: bytes, read: Read) -> ObjMaterials:
    """Find out what an OBJ is colored with.

    Args:
        obj: Content of the OBJ.
        read: Gives the files beside it.
    """
    used = _names(b"usemtl", obj)
    names = mtl_names(obj, lambda name: not is_outside(name) and read(posixpath.normpath(name)) is not None)
    libraries = tuple(dict.fromkeys(map(posixpath.normpath, names)))
    missing, colors, pictures = [], dict[str, str](), dict[str, list[str]]()
    for library in libraries:
        content = None if is_outside(library) else read(library)
        if content is None:
            missing.append(library)
            continue
        for material, key, value in _statements(content):
            if key == "kd":
                colors[material] = " ".join(value.split())
            elif key in ("map_kd", "map_d"):
                name = posixpath.join(posixpath.dirname(library), _without_options(value))
                pictures.setdefault(material, []).append(posixpath.normpath(name))
    textures = tuple(dict.fromkeys(name for key in sorted(used) for name in pictures.get(key, ())))
    missing += [name for name in textures if is_outside(name) or read(name) is None]
    plain = frozenset(colors.get(key, "") for key in used if key not in pictures)
    return ObjMaterials(libraries, textures, plain, tuple(missing))


def mtl_names(obj: bytes, exists: Callable[[str], bool]) -> list[str]:
    """Return the MTL files that an OBJ names.

    A line is one name where such a file exists, else several, between spaces or quotes, where one of them does.

    Args:
        obj: Content of the OBJ.
        exists: Whether there is such a file beside it.
    """
    names = list[str]()
    for line in re.findall(rb"^[^\S\n]*mtllib[^\S\n]+(\S[^\n]*)", plain_text(obj), re.MULTILINE):
        whole = _text(line.rstrip())
        bare = whole[1:-1] if re.fullmatch('"[^"]+"', whole) else whole
        several = [quoted or word for quoted, word in re.findall(r'"([^"]+)"|(\S+)', whole)]
        names += several if not exists(bare) and any(map(exists, several)) else [bare]
    return list(dict.fromkeys(names))


def libraries(path: Path, obj: bytes) -> tuple[list[Path], list[str]]:
    """Find the MTL files of an OBJ: those that it names; where one is not there, also the one of the OBJ's own name.

    Args:
        path: The OBJ.
        obj: Its content.

    Returns:
        The files, the first to be read first; and the names of those that are not there.
    """
    named = mtl_names(obj, partial(_is_beside, path))
    places = [find_file(path.parent, name) for name in named]
    found = [place for place in places if place]
    missing = [name for name, place in zip(named, places, strict=True) if not place]
    if named and not missing:
        return found, []
    own = [
        place for place in map(path.with_suffix, (".mtl", ".MTL")) if place.is_file() and place not in found
    ][:1]
    return [*own, *found], [] if own else missing


def _is_beside(path: Path, name: str) -> bool:
    return find_file(path.parent, name) is not None


def find_file(folder: Path, name: str) -> Path | None:
    """Find a file by a name that may be spelled as on other systems: in case, accents, or with backslashes.

    Args:
        folder: What the name starts from.
        name: A path.
    """
    place = folder
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        exact = place / part
        if not os.path.lexists(exact):
            try:
                same = sorted(one for one in os.listdir(place) if _plain(one) == _plain(part))
            except (OSError, ValueError):  # no folder; a zero in its name
                return None
            exact = place / same[0] if same else exact
        place = exact
    return place if os.path.isfile(place) else None


def _plain(name: str) -> str:
    """Return a name without what systems spell differently: case, and accents as characters of their own."""
    return unicodedata.normalize("NFC", name).casefold()


def find_undefined_materials(obj: bytes, mtl_files: Iterable[Path]) -> list[str]:
    """Return the materials of faces of an OBJ that its MTL files do not define; Blender's names for none are none."""
    defined = {name for path in mtl_files for name in _names(b"newmtl", path.read_bytes())}
    parts = re.split(rb"^[ \t]*usemtl[ \t]+(\S[^\n]*)", plain_text(obj), flags=re.MULTILINE | re.IGNORECASE)
    faces = re.compile(rb"^[ \t]*f[ \t]", re.MULTILINE)
    used = {
        _text(name.rstrip())
        for name, part in zip(parts[1::2], parts[2::2], strict=True)
        if faces.search(part)
    }
    return sorted(used - defined - {"(null)", "None"})


def find_invalid_face(obj: bytes) -> str:
    """Return the first face of an OBJ that has a vertex which is not there, as it is written; "" if there is none."""
    lines = [line.split() for line in plain_text(obj).split(b"\n")]
    total, count = sum(words[:1] == [b"v"] for words in lines), 0
    for words in lines:
        count += words[:1] == [b"v"]
        if words[:1] == [b"f"]:
            numbers = [int(found[0]) for word in words[1:] if (found := re.match(rb"-?\d+", word))]
            if not all(1 <= number <= total or -count <= number < 0 for number in numbers):
                return _text(b" ".join(words))
    return ""


def _names(keyword: bytes, content: bytes) -> set[str]:
    """Return what stands behind a keyword at the start of a line."""
    lines = re.findall(
        rb"^[ \t]*%s[ \t]+(\S[^\n]*)" % keyword, plain_text(content), re.MULTILINE | re.IGNORECASE
    )
    return {_text(name.rstrip()) for name in lines}


def plain_text(content: bytes) -> bytes:
    """Return an OBJ or MTL with line feeds alone, without a mark at its start and lines that go on in the next."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in content else content
    return re.sub(rb"\\[ \t]*\n", b" ", content)


def translate_mtl(files: Iterable[Path]) -> bytes:
    """Write MTL files as one, which Blender takes as they are meant; the table in ``blender_materials`` has the rules.

    Args:
        files: The MTL files; the last that says something of a material is right.
    """
    materials = dict[str, dict[str, str]]()
    for path in files:
        content = path.read_bytes()
        by_blender = re.match(rb"#\s*Blender", content) is not None
        for name, keyword, value in _statements(content):
            if keyword in _NUMBERS:
                value = value.split("#")[0].strip()
            if keyword == "kd" or (keyword == "ke" and not by_blender):
                color = _color(value)
                value = " ".join(f"{x if by_blender else srgb_to_linear(x):.9g}" for x in color)
            elif keyword in ("refl", "map_refl") and not by_blender:
                continue  # a reflected room, which Blender takes for where the surface is metal
            elif keyword in _PICTURES or keyword.startswith("map_"):
                value = _with_place(path.parent, value)
            statements = materials.setdefault(name, {})
            statements.pop(keyword, None)  # the last one stands, in its place
            if value:
                statements[keyword] = value
    lines = list[str]()
    for name, statements in materials.items():
        ambient = statements.pop("map_ka", None)
        if ambient and "map_kd" not in statements and os.path.isfile(_without_options(ambient)):
            statements["map_kd"] = ambient
        if statements.get("illum") not in _GLASS:
            statements.pop("tf", None)
        if statements.get("illum") in _MATT:
            for keyword in ("ks", "map_ks"):
                statements.pop(keyword, None)
        if statements.get("illum") == "2" and "map_ks" not in statements:
            statements.setdefault("ks", "0 0 0")  # Blender takes 1 1 1
        transparency = _color(statements.pop("tr", ""))
        if transparency and transparency[0] < 1:  # some programs write Tr 1 of what is opaque
            statements.setdefault("d", f"{1 - transparency[0]:.9g}")
        lines += [
            f"newmtl {name}",
            *(f"{_SPELLING.get(key, key)} {value}" for key, value in statements.items()),
        ]
    return ("\n".join(lines) + "\n").encode("utf-8", errors="surrogateescape")


def srgb_to_linear(srgb: float) -> float:
    """Return the srgb_to_linear light of an sRGB value in [0, 1]."""
    return srgb / 12.92 if srgb <= 0.04045 else float(((srgb + 0.055) / 1.055) ** 2.4)


def _color(value: str) -> list[float]:
    """Return three numbers in [0, 1], of which one alone stands for all; none where they are not written."""
    try:
        numbers = [float(word) for word in value.split()]
    except ValueError:
        return []
    if len(numbers) not in (1, 3) or any(map(math.isnan, numbers)):
        return []
    return [min(max(x, 0.0), 1.0) for x in (numbers * 3)[:3]]


def clamped_textures(files: Iterable[Path]) -> set[str]:
    """Return the pictures that MTL files do not repeat (``-clamp on``)."""
    return {
        _without_options(_with_place(path.parent, value))
        for path in files
        for _, keyword, value in _statements(path.read_bytes())
        if keyword.startswith("map_") and re.search(r"-clamp\s+on\s", value)
    }


def _with_place(folder: Path, value: str) -> str:
    """Put the path of a texture in place of its name; one that is not there keeps the place where it should be."""
    name = _without_options(value)
    bare = name.strip('"').replace("\\", "/")
    candidates = [folder / one for one in (name, bare, bare.replace("_", " "), posixpath.basename(bare))]
    place = next((one for one in candidates if os.path.isfile(one)), folder / bare)
    return value[: len(value) - len(name)] + str(place.absolute())


def is_outside(path: str) -> bool:
    """Say whether a relative path, once it is followed, ends outside the folder it is relative to."""
    return path.startswith("/") or ".." in path.split("/") or "\\" in path or ":" in path


def _statements(mtl: bytes) -> Iterator[tuple[str, str, str]]:
    """Yield (material, lower-case keyword, rest of the line) of an MTL."""
    material = ""
    for line in _text(plain_text(mtl)).split("\n"):
        found = re.match(r"[ \t]*(\S+)[ \t]+(.*)", line)
        keyword, rest = (found[1].lower(), found[2].rstrip(" \t\r")) if found else ("", "")
        if keyword == "newmtl":
            material = rest
        elif rest:
            yield material, keyword, rest


def _without_options(value: str) -> str:
    """Drop options before a texture's name: ``-s 2 2 1 -bm 0.03 wood grain.jpg`` -> ``wood grain.jpg``."""
    return re.sub(r"^(-((imfchan|type)\s+\w+|\w+(\s+(on|off|[-+.\d]+(e[-+]?\d+)?))*)\s+)+", "", value)


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="surrogateescape")
