"""Which layouts there are, and what is the same for all of them: finding objects, looking at them, reading them."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from data_tools.layouts import instantmesh, mvimgnet, openlrm, zero123
from data_tools.layouts.files import MAX_VIEWS, LayoutError, PosedViews
from lrm_pl.conventions import Normalization
from lrm_pl.data.schema import MAX_IMAGE_SIDE
from lrm_pl.images import DECODE_ERRORS

LAYOUTS = ("openlrm", "zero123", "instantmesh", "mvimgnet")

#: Views an object and their side for videos, unless others are asked for.
VIDEO_VIEWS, VIDEO_RESOLUTION = 24, 512


@dataclasses.dataclass(frozen=True)
class ViewFormat:
    """What all objects of a folder must have in common: a batch has one shape, a manifest one number of views.

    Attributes:
        views: Number of views.
        size: Width and height of the pictures.
    """

    views: int
    size: tuple[int, int]

    def __str__(self) -> str:
        """Say it in messages."""
        return f"{self.views} views of {self.size[0]} x {self.size[1]} pixels"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to read a folder.

    Attributes:
        name: What users call it.
        find: Lists the folders of objects.
        read: Reads an object's folder.
        kind: Looks at an object without reading all of it; None where its pictures cannot be looked at.
        normalize: How objects are scaled.
    """

    name: str
    find: Callable[[Path], list[Path]]
    read: Callable[[Path], PosedViews]
    kind: Callable[[Path], ViewFormat | None]
    normalize: Normalization


def layout_renderer(layout: str) -> str:
    """Return what samples that were converted from a layout have as their renderer."""
    return f"converted from {layout}"


def get_layout(
    name: str, root: Path, resolution: int | None = None, views: int | None = None, masks: Path | None = None
) -> Layout:
    """Say how to read a folder.

    Args:
        name: One of ``LAYOUTS``.
        root: The folder.
        resolution: Side of the views that is asked for.
        views: Views an object, for videos.
        masks: Folder of masks, for videos.

    Raises:
        LayoutError: Numbers that make no sense, or options of another layout.
    """
    for option, value, most in (("--res", resolution, MAX_IMAGE_SIDE), ("--views", views, MAX_VIEWS)):
        if value is not None and not 1 <= value <= most:
            raise LayoutError(expected=f"{option} from 1 to {most}", found=value)
    if name == "mvimgnet":
        kind = ViewFormat(views or VIDEO_VIEWS, (resolution or VIDEO_RESOLUTION,) * 2)
        read = partial(_read_video, root=root, masks=masks, kind=kind)
        return Layout(name, mvimgnet.find_objects, read, lambda _: kind, "sphere")
    if views is not None or masks is not None:
        raise LayoutError(expected="--views and --masks with --from mvimgnet only", found=f"--from {name}")
    files = {"openlrm": openlrm, "zero123": zero123, "instantmesh": instantmesh}[name]
    return Layout(
        name, files.find_objects, files.read_object, partial(_kind, pictures=files.list_images), "cube"
    )


def _kind(folder: Path, pictures: Callable[[Path], list[Path]]) -> ViewFormat | None:
    try:
        files = pictures(folder)
        with Image.open(files[0], formats=("PNG", "WEBP")) as image:  # only its header is read
            return ViewFormat(len(files), image.size)
    except (IndexError, *DECODE_ERRORS):
        return None  # whoever reads it says why


def _read_video(folder: Path, root: Path, masks: Path | None, kind: ViewFormat) -> PosedViews:
    place = folder / "masks" if masks is None else masks / folder.relative_to(root)
    return mvimgnet.read_object(folder, place, kind.views, kind.size[0])
