"""Parser for the materials, colors and textures in OBJ and MTL files, which does not require Blender."""

import dataclasses
import math
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from lrm_pl.color_spaces import srgb_to_linear

#: Function that returns the content of a file relative to the folder of the OBJ, or None if the file is missing.
ReadFile = Callable[[str], bytes | None]

#: Values of ``illum`` for transmissive materials (MTL format, section 5).
_GLASS = frozenset({"4", "6", "7", "9"})

#: Values of ``illum`` for materials without specular highlights. ``Ks`` has no effect for them.
_MATT = frozenset({"0", "1"})

#: Statements with numeric arguments. A comment can follow the arguments. In all other statements, "#" does not start a
#: comment, because file names can contain this character.
_NUMBERS = frozenset({"ka", "kd", "ks", "ke", "tf", "ns", "ni", "d", "tr", "illum"})

#: Statements with an image file whose keyword does not start with ``map_``.
_IMAGES = frozenset({"bump", "disp", "decal", "norm", "refl"})

#: Mapping from lower-case keywords to the spelling that Blender requires.
_SPELLING = {
    name.lower(): name
    for name in (
        "Kd Ks Ke Ns Ni Tr Tf Pr Pm Ps Pc Pcr map_Kd map_Ks map_Ns map_Ke map_Bump map_Pr map_Pm map_Ps"
    ).split()
}


@dataclasses.dataclass(frozen=True)
class ObjMaterials:
    """Materials that the faces of an OBJ use.

    Attributes:
        libraries: MTL files to which the OBJ refers, in order, relative to the folder of the OBJ.
        textures: Color and opacity textures of the materials, relative to the folder of the OBJ.
        colors: Colors (arguments of ``Kd``) of the materials without a texture.
        missing: Items of ``libraries`` and ``textures`` that do not exist or are outside the folder of the OBJ.
    """

    libraries: tuple[str, ...]
    textures: tuple[str, ...]
    colors: frozenset[str]
    missing: tuple[str, ...]


def read_obj_materials(obj: bytes, read: ReadFile) -> ObjMaterials:
    """Return the materials that an OBJ uses.

    Args:
        obj: Content of the OBJ.
        read: Function that returns the content of the file at a path relative to the folder of the OBJ, or None if the
            file is missing.
    """
    used = _names(b"usemtl", obj)
    names = mtl_names(obj, lambda name: not is_outside(name) and read(posixpath.normpath(name)) is not None)
    libraries = tuple(dict.fromkeys(map(posixpath.normpath, names)))
    missing, colors, images = [], dict[str, str](), dict[str, list[str]]()
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
                images.setdefault(material, []).append(posixpath.normpath(name))
    textures = tuple(dict.fromkeys(name for key in sorted(used) for name in images.get(key, ())))
    missing += [name for name in textures if is_outside(name) or read(name) is None]
    plain = frozenset(colors.get(key, "") for key in used if key not in images)
    return ObjMaterials(libraries, textures, plain, tuple(missing))


def mtl_names(obj: bytes, exists: Callable[[str], bool]) -> list[str]:
    """Return the names of the MTL files of an OBJ.

    If the argument of ``mtllib`` is not the name of a file, it is split at spaces and quotes, provided that a file with
    one of the resulting names exists.

    Args:
        obj: Content of the OBJ.
        exists: Function that returns whether the file with the given name exists.
    """
    names = list[str]()
    for line in re.findall(rb"^[^\S\n]*mtllib[^\S\n]+(\S[^\n]*)", normalize_lines(obj), re.MULTILINE):
        whole = _text(line.rstrip())
        bare = whole[1:-1] if re.fullmatch('"[^"]+"', whole) else whole
        several = [quoted or word for quoted, word in re.findall(r'"([^"]+)"|(\S+)', whole)]
        names += several if not exists(bare) and any(map(exists, several)) else [bare]
    return list(dict.fromkeys(names))


def find_mtl_files(path: Path, obj: bytes) -> tuple[list[Path], list[str]]:
    """Find the MTL files of an OBJ.

    If a file is missing or the OBJ does not name an MTL file, an existing MTL file with the stem of the OBJ is added.

    Args:
        path: Path of the OBJ.
        obj: Content of the OBJ.

    Returns:
        The paths of the files in the order in which they are read, and the names of missing files. If an MTL file with
        the stem of the OBJ was added, the second list is empty.
    """
    named = mtl_names(obj, lambda name: find_file(path.parent, name) is not None)
    paths = {name: find_file(path.parent, name) for name in named}
    found = [file for file in paths.values() if file]
    missing = [name for name, file in paths.items() if not file]
    if named and not missing:
        return found, []
    for own in map(path.with_suffix, (".mtl", ".MTL")):
        if own.is_file() and own not in found:
            return [own, *found], []
    return found, missing


def find_file(folder: Path, name: str) -> Path | None:
    """Find a file, ignoring differences in case, Unicode normalization and path separators.

    Args:
        folder: Base folder.
        name: Path relative to the base folder.

    Returns:
        Path of the file, or None if there is no such file.
    """
    current = folder
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        exact = current / part
        if not os.path.lexists(exact):
            try:
                same = sorted(one for one in os.listdir(current) if _normalized(one) == _normalized(part))
            except (OSError, ValueError):  # not a folder, or a null byte in the name
                return None
            exact = current / same[0] if same else exact
        current = exact
    return current if os.path.isfile(current) else None


def _normalized(name: str) -> str:
    """Return a name after Unicode normalization and case folding."""
    return unicodedata.normalize("NFC", name).casefold()


def find_undefined_materials(obj: bytes, mtl_files: Iterable[Path]) -> list[str]:
    """Return the names of materials that faces use but no MTL file defines.

    "(null)" and "None", which Blender writes for faces without a material, are excluded.
    """
    defined = {name for path in mtl_files for name in _names(b"newmtl", path.read_bytes())}
    faces = re.compile(rb"^[ \t]*f[ \t]", re.MULTILINE)
    _, *parts = _statement(b"usemtl").split(normalize_lines(obj))
    pairs = zip(parts[::2], parts[1::2], strict=True)
    used = {_text(name.rstrip()) for name, statements in pairs if faces.search(statements)}
    return sorted(used - defined - {"(null)", "None"})


def find_invalid_face(obj: bytes) -> str:
    """Return the first face statement with an out-of-range vertex index, or "" if there is none."""
    lines = [line.split() for line in normalize_lines(obj).split(b"\n")]
    total, count = sum(words[:1] == [b"v"] for words in lines), 0
    for words in lines:
        count += words[:1] == [b"v"]
        if words[:1] == [b"f"]:
            numbers = [int(found[0]) for word in words[1:] if (found := re.match(rb"-?\d+", word))]
            if not all(1 <= number <= total or -count <= number < 0 for number in numbers):
                return _text(b" ".join(words))
    return ""


def _names(keyword: bytes, content: bytes) -> set[str]:
    """Return the arguments of all statements with the given keyword."""
    return {_text(name.rstrip()) for name in _statement(keyword).findall(normalize_lines(content))}


def _statement(keyword: bytes) -> re.Pattern[bytes]:
    return re.compile(rb"^[ \t]*%s[ \t]+(\S[^\n]*)" % keyword, re.MULTILINE | re.IGNORECASE)


def normalize_lines(content: bytes) -> bytes:
    """Return the content of an OBJ or MTL without carriage returns, a byte order mark or line continuations."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in content else content
    return re.sub(rb"\\[ \t]*\n", b" ", content)


def translate_mtl(files: Iterable[Path]) -> bytes:
    """Merge MTL files into an MTL file that Blender reads correctly.

    ``data_tools/blender/README.md`` lists the rules.

    Args:
        files: Paths of the MTL files. Later definitions override earlier definitions.

    Returns:
        Content of the merged MTL file.
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
                continue  # a reflection map, which Blender reads as a metallic map
            elif keyword in _IMAGES or keyword.startswith("map_"):
                value = _with_path(path.parent, value)
            statements = materials.setdefault(name, {})
            statements.pop(keyword, None)  # the last definition determines the value and the position
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
            statements.setdefault("ks", "0 0 0")  # the default of Blender is 1 1 1
        transparency = _color(statements.pop("tr", ""))
        if transparency and transparency[0] < 1:  # some programs write Tr 1 for opaque materials
            statements.setdefault("d", f"{1 - transparency[0]:.9g}")
        lines.append(f"newmtl {name}")
        lines += [f"{_SPELLING.get(key, key)} {value}" for key, value in statements.items()]
    return ("\n".join(lines) + "\n").encode("utf-8", errors="surrogateescape")


def _color(value: str) -> list[float]:
    """Parse a color of one or three numbers and clamp it to [0, 1]. If the text is invalid, return []."""
    try:
        numbers = [float(word) for word in value.split()]
    except ValueError:
        return []
    if len(numbers) not in (1, 3) or any(map(math.isnan, numbers)):
        return []
    return [min(max(x, 0.0), 1.0) for x in (numbers * 3)[:3]]


def clamped_textures(files: Iterable[Path]) -> set[str]:
    """Return the paths of textures with the option ``-clamp on``."""
    return {
        _without_options(_with_path(path.parent, value))
        for path in files
        for _, keyword, value in _statements(path.read_bytes())
        if keyword.startswith("map_") and re.search(r"-clamp\s+on\s", value)
    }


def _with_path(folder: Path, value: str) -> str:
    """Replace the file name in a texture statement with the absolute path, even if the file does not exist."""
    name = _without_options(value)
    bare = name.strip('"').replace("\\", "/")
    candidates = [folder / one for one in (name, bare, bare.replace("_", " "), posixpath.basename(bare))]
    path = next((one for one in candidates if os.path.isfile(one)), folder / bare)
    return value[: len(value) - len(name)] + str(path.absolute())


def is_outside(path: str) -> bool:
    """Return whether a relative path may be outside the base folder."""
    return path.startswith("/") or ".." in path.split("/") or "\\" in path or ":" in path


def _statements(mtl: bytes) -> Iterator[tuple[str, str, str]]:
    """Yield (material, lower-case keyword, arguments) for each statement of an MTL."""
    material = ""
    for line in _text(normalize_lines(mtl)).split("\n"):
        found = re.match(r"[ \t]*(\S+)[ \t]+(.*)", line)
        keyword, rest = (found[1].lower(), found[2].rstrip(" \t\r")) if found else ("", "")
        if keyword == "newmtl":
            material = rest
        elif rest:
            yield material, keyword, rest


def _without_options(value: str) -> str:
    """Remove the options of a texture statement. ``-s 2 2 1 -bm 0.03 wood grain.jpg`` becomes ``wood grain.jpg``."""
    return re.sub(r"^(-((imfchan|type)\s+\w+|\w+(\s+(on|off|[-+.\d]+(e[-+]?\d+)?))*)\s+)+", "", value)


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="surrogateescape")
