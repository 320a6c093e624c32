"""The supported layouts, and the functions that find and read their objects."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from data_tools.layouts import mvimgnet
from data_tools.layouts.files import MAX_VIEWS, LayoutError, PosedViews, find_folders, numbered_images
from data_tools.layouts.renders import RENDER_LAYOUTS
from lrm_pl.conventions import Normalization
from lrm_pl.data.schema import MAX_IMAGE_SIDE
from lrm_pl.images import DECODE_ERRORS

LAYOUTS = (*RENDER_LAYOUTS, "mvimgnet")

#: Default number of views per object, and width and height of the views in pixels, for videos.
VIDEO_VIEWS, VIDEO_RESOLUTION = 24, 512


@dataclasses.dataclass(frozen=True)
class ViewFormat:
    """Number and size of views, which must be the same for all objects of a data set.

    Attributes:
        views: Number of views.
        size: Width and height of the views in pixels.
    """

    views: int
    size: tuple[int, int]

    def __str__(self) -> str:
        """Return a description of the number and size of views."""
        return f"{self.views} views of {self.size[0]} x {self.size[1]} pixels"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Functions that read a layout.

    Attributes:
        name: Name of the layout on the command line.
        find: Function that returns the object folders in a folder.
        read: Function that reads the views in an object folder.
        view_format: Function that returns the format of the views of an object without decoding the images, or None if
            the images cannot be read.
        normalize: Normalization of the objects, "sphere" or "cube".
    """

    name: str
    find: Callable[[Path], list[Path]]
    read: Callable[[Path], PosedViews]
    view_format: Callable[[Path], ViewFormat | None]
    normalize: Normalization


def layout_renderer(layout: str) -> str:
    """Return the ``renderer`` field of samples that were converted from a layout."""
    return f"converted from {layout}"


def get_layout(
    name: str, root: Path, resolution: int | None = None, views: int | None = None, masks: Path | None = None
) -> Layout:
    """Return the functions that read a layout.

    Args:
        name: Name of the layout, one of ``LAYOUTS``.
        root: Folder of the data set.
        resolution: Width and height of the views in pixels, for videos. If None, ``VIDEO_RESOLUTION`` is used.
        views: Number of views per object, for videos. If None, ``VIDEO_VIEWS`` is used.
        masks: Folder of masks, for videos. If None, the folder ``masks`` of each object is used.

    Raises:
        LayoutError: A number is out of range, or an option does not apply to the layout.
    """
    for option, value, most in (("--res", resolution, MAX_IMAGE_SIDE), ("--views", views, MAX_VIEWS)):
        if value is not None and not 1 <= value <= most:
            raise LayoutError(expected=f"a value of {option} from 1 to {most}", found=value)
    if name == "mvimgnet":
        video = ViewFormat(views or VIDEO_VIEWS, (resolution or VIDEO_RESOLUTION,) * 2)
        find = partial(find_folders, names=mvimgnet.OBJECT_NAMES)
        read = partial(
            mvimgnet.read_object, root=root, masks=masks, views=video.views, resolution=video.size[0]
        )
        return Layout(name, find, read, lambda _: video, "sphere")
    if views is not None or masks is not None:
        raise LayoutError(expected="--from mvimgnet if --views or --masks is passed", found=f"--from {name}")
    layout = RENDER_LAYOUTS[name]
    find = partial(find_folders, names=layout.names)
    return Layout(name, find, layout.read, partial(_view_format, images=layout.images), "cube")


def _view_format(folder: Path, images: str) -> ViewFormat | None:
    try:
        files = numbered_images(folder / images)
        with Image.open(files[0], formats=("PNG", "WEBP")) as image:  # reads only the header
            return ViewFormat(len(files), image.size)
    except DECODE_ERRORS:
        return None  # reported when the object is read
