"""Safe extraction of untrusted zip files.

The unpacked size is limited, and paths outside the destination folder are rejected.
"""

import errno
import lzma
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from data_tools.assets.obj_materials import is_outside
from lrm_pl.errors import InputError

#: Maximum total size of the unpacked files of a model in bytes.
MAX_MODEL_BYTES = 1 << 30

#: Exceptions that ``zipfile`` raises for damaged or malicious archives.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, ValueError,
    OverflowError, struct.error,
)  # fmt: skip

#: Error numbers of invalid file names, and of a name that a file and a folder have in common.
_NAME_ERRORS = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)


class ArchiveError(InputError):
    """Raised if an archive is damaged or has invalid contents."""


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file.

    Raises:
        ArchiveError: The file is not a zip file.
    """
    try:
        return zipfile.ZipFile(path)
    except _ZIP_ERRORS as error:
        raise ArchiveError(subject=path.name, expected="a zip file", found=error) from error


def read_member(archive: zipfile.ZipFile, name: str, limit: int = MAX_MODEL_BYTES) -> bytes | None:
    """Read one file of a zip archive.

    Args:
        archive: Zip archive.
        name: Name of the file in the archive.
        limit: Maximum unpacked size of the file in bytes.

    Returns:
        The content of the file, or None if the archive does not contain it.

    Raises:
        ArchiveError: The file is damaged or larger than ``limit``.
    """
    try:
        member = archive.getinfo(name)
    except KeyError:
        return None
    if member.file_size > limit:
        expected = f"at most {limit} bytes in {name}"
        raise ArchiveError(subject=archive.filename, expected=expected, found=member.file_size)
    try:
        return archive.read(member)  # reads at most file_size bytes and verifies the checksum
    except (*_ZIP_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # bz2 raises OSError without errno
            raise
        raise ArchiveError(f"{archive.filename}: {name} is damaged: {error}") from error


def extract(archive: zipfile.ZipFile, members: Mapping[str, str], folder: Path) -> None:
    """Extract files of a zip archive to a folder.

    Args:
        archive: Zip archive.
        members: Mapping from paths in the folder to names in the archive.
        folder: Destination folder.

    Raises:
        ArchiveError: A path is invalid or outside the folder, a file is missing or damaged, or the total unpacked
            size exceeds ``MAX_MODEL_BYTES``.
    """
    remaining = MAX_MODEL_BYTES
    for path, name in members.items():
        if is_outside(path):
            raise ArchiveError(subject=archive.filename, expected="paths inside the folder", found=repr(path))
        content = read_member(archive, name, remaining)
        if content is None:
            raise ArchiveError(subject=archive.filename, expected=f"the file {name}", found="none")
        remaining -= len(content)
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        except OSError as error:
            if error.errno not in _NAME_ERRORS:
                raise
            raise ArchiveError(subject=archive.filename, expected="valid file names", found=error) from error
