"""Search for the images that the arguments of ``lrm infer`` refer to.

Importing this module does not import torch, so that invalid paths are reported immediately.
"""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lrm_pl.errors import InputError

#: Suffixes of image files. Files with other suffixes in a folder are skipped.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif")


def find_images(paths: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """List the images that a list of paths refers to.

    Args:
        paths: Image files, folders of images, and glob patterns.

    Returns:
        The images by name of the result folder, and the skipped files in the folders. The name of a result folder is
        the stem of the image. If two images have the same stem, the file name is used. If two images have the same
        file name, the names of their folders are prepended to it.

    Raises:
        InputError: A path does not exist, a folder contains no images, or two results would have the same name.
    """
    found, skipped = dict[Path, Path](), list[Path]()
    for path in (match for given in paths for match in _expand(given)):
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if not file.is_dir() and file.name[0] != ".")
            images = [file for file in files if file.suffix.lower() in SUFFIXES]
            if not images:
                raise InputError(expected=f"images ({', '.join(SUFFIXES)}) in {path}", found="none")
            found |= {image.absolute(): image for image in images}
            skipped += [file for file in files if file not in images]
        elif path.is_file():
            found[path.absolute()] = path
        else:
            raise InputError(
                expected=f"an image or a folder of images at {path}",
                found="neither",
                remedy="correct the path",
            )
    stems = Counter(path.stem for path in found)
    names = Counter(path.name for path in found)
    named = dict[str, Path]()
    for absolute, path in found.items():
        is_unique = stems[path.stem] == 1 and path.stem not in (".", "..")
        name = path.stem if is_unique else path.name
        if names[path.name] > 1:
            name = f"{absolute.parent.name}-{path.name}"
        if name in named:
            raise InputError(
                expected="images with different names",
                found=f"{named[name]} and {path}, which would both be written to OUT/{name}",
                remedy="rename one of the images",
            )
        named[name] = path
    return named, skipped


def _expand(path: Path) -> list[Path]:
    """Expand a glob pattern. Existing paths and patterns without matches are returned unchanged."""
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path)))) or [path]
