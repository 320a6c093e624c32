"""Detection of files whose contents do not match the suffix, for example, error pages that were saved as meshes."""

import re
from pathlib import Path

from data_tools.assets.obj_materials import find_mtl_files
from lrm_pl.errors import InputError

#: Number of bytes that are read to detect the type of a file.
HEAD_BYTES = 4096

_OBJ_WORDS = frozenset(b"mtllib usemtl v vn vt vp o g s f l p mg".split())

#: Remedies in error messages.
EXPORT_AGAIN = "export the mesh again"
_ERROR_PAGE = "check the URL; the file may be an error page of the server"


class FileTypeError(InputError):
    """Raised if the contents of a file do not have the expected type, size or hash."""


def check_head(suffix: str, head: bytes, where: str) -> None:
    """Check the type of a file based on the first bytes.

    Args:
        suffix: Suffix of the expected type, for example, ".glb". Only mesh, zip and gzip files are checked.
        head: First ``HEAD_BYTES`` bytes of the file, or the whole file if it is smaller.
        where: Path or URL for error messages.

    Raises:
        FileTypeError: The file has a different type.
    """
    file_type = suffix.lower()
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    matches = {
        ".glb": head.startswith(b"glTF"),
        ".gltf": text.startswith(b"{"),
        ".ply": head.startswith(b"ply"),
        ".fbx": head.startswith((b"Kaydara FBX Binary", b";")) or text.startswith(b"FBX"),
        ".obj": b"\0" not in head and _starts_like_obj(text),
        ".zip": head.startswith(b"PK"),
        ".gz": head.startswith(b"\x1f\x8b"),
    }
    if not matches.get(file_type, True):
        raise FileTypeError(file_type[1:], _describe(head), _ERROR_PAGE, where)


def check_file_type(path: Path, suffix: str, where: str) -> None:
    """Check the type of a file and, for a GLB, the length in the header.

    Args:
        path: Path of the file.
        suffix: Suffix of the expected type. The suffix of ``path`` can be different.
        where: Path or URL for error messages.

    Raises:
        FileTypeError: The file has a different type or is truncated.
    """
    file_type = suffix.lower()
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    check_head(file_type, head, where)
    if file_type == ".glb":
        length = int.from_bytes(head[8:12], "little") if len(head) >= 12 else 12
        size = path.stat().st_size
        if length != size:
            expected = f"{length} bytes according to the header"
            raise FileTypeError(expected, size, "download the file again", where)
    if file_type == ".gltf" and b'"asset"' not in path.read_bytes():
        found = f"{_describe(head)} and has no asset field"
        raise FileTypeError("gltf", found, _ERROR_PAGE, where)


def check_mesh_file(path: Path) -> None:
    """Reject mesh files that importers read incorrectly without an error.

    Args:
        path: Path of the mesh file.

    Raises:
        FileTypeError: The file is empty, is an HTML or UTF-16 file, or contains a non-finite vertex position.
    """
    file_type = path.suffix.lower()
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
    if not head.strip():
        raise FileTypeError(expected=file_type[1:], found="an empty file", remedy="download the file again")
    if head.lstrip().startswith(b"<"):
        raise FileTypeError(file_type[1:], _describe(head), _ERROR_PAGE)
    _reject_utf16(path, head, file_type in (".obj", ".gltf"))
    if file_type == ".obj":
        content = path.read_bytes()
        for library in find_mtl_files(path, content)[0]:
            with open(library, "rb") as file:
                _reject_utf16(library, file.read(HEAD_BYTES), True)
        _reject_non_finite(content, 1)
    elif file_type == ".ply" and b"format ascii" in head:
        _reject_non_finite(path.read_bytes(), 0)


def _reject_utf16(path: Path, head: bytes, is_text: bool) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (is_text and b"\0" in head):
        raise FileTypeError("UTF-8 text", "UTF-16 or null bytes", "save the file as UTF-8", path.name)


def _reject_non_finite(content: bytes, first: int) -> None:
    """Reject vertex positions that are not finite float32 values, because importers read them as 0.

    Args:
        content: Content of an OBJ or of an ASCII PLY.
        first: Index of the x coordinate among the words of a line. It is 1 for an OBJ, whose vertex lines start with
            "v", and 0 for a PLY.
    """
    # Searching for substrings is much faster than parsing all numbers.
    lower, digits = content.lower(), content.translate(_DIGITS)
    if not (any(word in lower for word in _WORDS) or b"0" * 39 in digits or _EXPONENT.search(lower)):
        return
    for number, line in enumerate(content.splitlines(), 1):
        words = line[:2000].split()
        if (not first or words[:1] == [b"v"]) and any(map(_is_non_finite, words[first : first + 3])):
            found = f"{_quote(line)} in line {number}"
            raise FileTypeError("finite float32 vertex positions", found, EXPORT_AGAIN)


def _is_non_finite(word: bytes) -> bool:
    try:
        return not abs(float(word)) <= _LARGEST
    except ValueError:
        return _NON_FINITE.fullmatch(word) is not None


#: NaN and infinity in the formats that C libraries print.
_NON_FINITE = re.compile(rb"[+-]?(nan(\(\w*\))?|inf(inity)?|1\.?#\w+)", re.IGNORECASE)

_WORDS = (b"nan", b"inf", b"#ind")

#: Exponents of numbers outside the range of float32.
_EXPONENT = re.compile(rb"e\+?0*(?:3[89]|[4-9]\d|\d{3})")

#: The largest float32.
_LARGEST = 3.4028235677973366e38

#: Translation table that replaces digits by 0.
_DIGITS = bytes.maketrans(b"123456789", b"000000000")


def _starts_like_obj(text: bytes) -> bool:
    lines = [line for line in text.split(b"\n") if line.strip() and not line.lstrip().startswith(b"#")]
    return text.startswith(b"#") if not lines else lines[0].split()[0] in _OBJ_WORDS


def _describe(head: bytes) -> str:
    return f"a file that starts with {_quote(head)}" if head else "an empty file"


def _quote(head: bytes) -> str:
    return repr(head[:60].decode("utf-8", "replace"))
