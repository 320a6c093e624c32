"""Taking files out of zips that others made: nothing leaves the folder, no more is written than a model may be."""

import errno
import lzma
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from data_tools.assets.obj_materials import is_outside
from lrm_pl.errors import InputError

#: What the files of one model may be in all, unpacked.
MAX_MODEL_BYTES = 1 << 30


#: What a zip that is damaged, or was made to do damage, may be answered with.
DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, ValueError,
    OverflowError, struct.error,
)  # fmt: skip


class ArchiveError(InputError):
    """An archive is damaged, or holds what it should not; the message says what."""


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip.

    Raises:
        ArchiveError: It is none.
    """
    try:
        return zipfile.ZipFile(path)
    except DAMAGE as error:
        raise ArchiveError(subject=path.name, expected="a zip", found=error) from error


def read_member(archive: zipfile.ZipFile, name: str, limit: int = MAX_MODEL_BYTES) -> bytes | None:
    """Return one file of a zip, or None where it has no such file.

    Raises:
        ArchiveError: It says that it is larger than ``limit`` bytes, or it is damaged.
    """
    try:
        member = archive.getinfo(name)
    except KeyError:
        return None
    if member.file_size > limit:
        raise ArchiveError(
            subject=archive.filename,
            expected=f"{name} to be of at most {limit} bytes",
            found=member.file_size,
            remedy="it is no model",
        )
    try:
        return archive.read(member)  # never more than it says that it is, and its checksum is looked at
    except (*DAMAGE, OSError) as error:  # OSError: bz2's
        if isinstance(error, OSError) and error.errno is not None:  # the disk's
            raise
        raise ArchiveError(
            subject=archive.filename, expected=f"to read {name}", found=error, remedy="it is damaged"
        ) from error


def extract(archive: zipfile.ZipFile, members: Mapping[str, str], folder: Path) -> None:
    """Write files of a zip to a folder.

    Args:
        archive: The zip.
        members: Path in the folder -> name in the zip.
        folder: The folder.

    Raises:
        ArchiveError: A path leaves the folder, a file is not there or damaged, or all are larger than a model is.
    """
    left = MAX_MODEL_BYTES
    for path, name in members.items():
        if is_outside(path):
            raise ArchiveError(
                subject=archive.filename,
                expected="paths inside the model's folder",
                found=f"{path!r}",
                remedy="it is not used",
            )
        content = read_member(archive, name, left)
        if content is None:
            raise ArchiveError(subject=archive.filename, expected=f"the file {name}", found="none")
        left -= len(content)
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
            raise ArchiveError(
                subject=archive.filename, expected="files and folders of different names", found=error
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.EINVAL):
                raise
            raise ArchiveError(
                subject=archive.filename, expected="names that a file may have", found=error
            ) from error
