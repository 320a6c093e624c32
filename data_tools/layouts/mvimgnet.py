"""MVImgNet's videos (github.com/GAP-LAB-CUHK-SZ/MVImgNet), cropped to the object as LRM does (section 4.1).

    <category>/<instance>/images/001.jpg
    <category>/<instance>/sparse/0/{cameras,images}.bin         COLMAP; some instances have none, sparse/1 is no good
    MASKS/<category>/<instance>/001.jpg.png                     a download of its own; MVImgNet 2.0 has it as
    <category>/<instance>/masks/001.jpg.png                     a folder of the instance

A view becomes the square about its mask, with a margin; what lies outside the mask becomes transparent, what lies
outside the picture too, and the intrinsics become those of the square. The world becomes that of ``object_frame``: the
input camera keeps its distance, in units of the object's size, and nothing forces it to 2.

A view counts where picture and mask are there and the mask does not touch the picture's edge: elsewhere a part of the
object is missing. Of those that count, evenly spaced ones are taken.
"""

import dataclasses
import io
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_tools.layouts.colmap import PosedImage, read_model
from data_tools.layouts.files import LayoutError, PosedViews, find_folders, read_file
from data_tools.layouts.object_frame import ObjectOutline, to_object_frame
from lrm_pl.data.schema import MAX_IMAGE_SIDE, encode_image
from lrm_pl.errors import InputError
from lrm_pl.images import DECODE_ERRORS, open_image, to_rgb8

#: Added on each side of the mask, as a part of its longer side.
MARGIN = 0.1

#: Distortion is left in where it moves no corner of the crop by more than this part of its side.
MOST_DISTORTION = 0.01


@dataclasses.dataclass(frozen=True)
class Frame:
    """A view that counts.

    Attributes:
        image: Its pose.
        picture: Its file.
        mask: The file of its mask.
        corner: Left and top of the square to be cut out, pixels, possibly outside the picture.
        side: Side of that square.
        sighting: What it shows of the object.
    """

    image: PosedImage
    picture: Path
    mask: Path
    corner: tuple[int, int]
    side: int
    sighting: ObjectOutline


def find_objects(root: Path) -> list[Path]:
    """List the folders of objects below ``root``."""
    return find_folders(root, "images|sparse")


def read_object(folder: Path, masks: Path, views: int, resolution: int) -> PosedViews:
    """Read an object.

    Args:
        folder: Its folder.
        masks: The folder of its masks.
        views: Views wanted.
        resolution: Side of the crops, pixels.

    Raises:
        LayoutError: A file is strange, or there are too few views.
    """
    found = [_frame(image, folder / "images", masks) for image in read_model(folder / "sparse" / "0")]
    frames = [frame for frame in found if isinstance(frame, Frame)]
    if len(frames) < views:
        lost = Counter(frame for frame in found if isinstance(frame, str))
        told = ", ".join(f"{count} {why}" for why, count in lost.items())
        raise LayoutError(
            subject=folder,
            expected=f"at least {views} whole views",
            found=f"{len(frames)} of {len(found)}: {told}",
        )
    frames = [frames[i * len(frames) // views] for i in range(views)]
    return PosedViews(
        c2w=to_object_frame([frame.sighting for frame in frames], str(folder)).astype(np.float32),
        fxfycxcy=np.stack([_intrinsics(frame) for frame in frames]).astype(np.float32),
        views=tuple(_crop(frame, resolution) for frame in frames),
    )


def _frame(image: PosedImage, pictures: Path, masks: Path) -> Frame | str:
    """Look at a view's mask; a string says why the view does not count."""
    if Path(image.name).name != image.name:
        raise LayoutError(
            subject=pictures, expected="plain file names in images.bin", found=f"{image.name!r}"
        )
    picture, mask = pictures / image.name, masks / f"{image.name}.png"
    if not picture.is_file():
        return "without a picture"
    if not mask.is_file():
        return "without a mask"
    solid = _decoded(mask, "mask", image)[..., 0] > 127
    if not solid.any():
        return "with an empty mask"
    if solid[[0, -1]].any() or solid[:, [0, -1]].any():
        return "cut by the picture's edge"
    rows = np.flatnonzero(solid.any(axis=1))
    first, last = solid[rows].argmax(axis=1), solid.shape[1] - solid[rows, ::-1].argmax(axis=1)
    low, high = np.array([first.min(), rows[0]]), np.array([last.max(), rows[-1] + 1])
    side = int(np.ceil((high - low).max() * (1 + 2 * MARGIN)))
    left, top = (int(x) for x in np.floor((low + high - side) / 2))
    corners = np.array([(x, y) for x in (left, left + side) for y in (top, top + side)], dtype=np.float64)
    moved = float(image.camera.displacement(corners).max()) / side
    if moved > MOST_DISTORTION:
        raise LayoutError(
            subject=picture,
            expected=f"a lens that moves the crop's corners by at most {MOST_DISTORTION:.0%} of its side",
            found=f"{moved:.1%}",
            remedy="undistort the pictures with COLMAP's image_undistorter",
        )
    # Of each row of the mask its two ends: nothing between them is farther out.
    outline = np.concatenate([np.stack([first, rows + 0.5], axis=1), np.stack([last, rows + 0.5], axis=1)])
    rays, middle = _rays(image, outline), _rays(image, (low + high)[None] / 2)[0]
    return Frame(image, picture, mask, (left, top), side, ObjectOutline(image.c2w, rays, middle))


def _rays(image: PosedImage, pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the unit directions, in the world, of (N, 2) points of a picture."""
    camera = image.camera
    x, y = (pixels[:, 0] - camera.cx) / camera.fx, (pixels[:, 1] - camera.cy) / camera.fy
    rays = np.stack([x, y, np.ones_like(x)], axis=1) @ image.c2w[:3, :3].T
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _intrinsics(frame: Frame) -> npt.NDArray[np.float64]:
    camera, (left, top) = frame.image.camera, frame.corner
    return np.array([camera.fx, camera.fy, camera.cx - left, camera.cy - top]) / frame.side


def _crop(frame: Frame, resolution: int) -> bytes:
    """Cut out the square with the mask as alpha, resize it, encode it."""
    rgb, alpha = _decoded(frame.picture, "picture", frame.image), _decoded(frame.mask, "mask", frame.image)
    left, top = frame.corner
    whole = Image.fromarray(np.concatenate([rgb, alpha], axis=2))
    square = whole.crop((left, top, left + frame.side, top + frame.side))
    # Premultiplied, so that no background bleeds in; BOX would shift pixels where the ratio of sizes is no integer.
    small = square.convert("RGBa").resize((resolution, resolution), Image.Resampling.HAMMING)
    return encode_image(np.array(small.convert("RGBA"), dtype=np.uint8))


def _decoded(path: Path, kind: Literal["picture", "mask"], image: PosedImage) -> npt.NDArray[np.uint8]:
    """Decode a picture to (H, W, 3) sRGB, or a mask (its alpha, else gray or blue) to (H, W, 1), of the camera's size.

    Nothing is turned: COLMAP computed the camera for the pixels as they are stored, whatever EXIF says.
    """
    size, content = (image.camera.width, image.camera.height), read_file(path)
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as encoded:
            if encoded.size != size or max(size) > MAX_IMAGE_SIDE:
                raise LayoutError(
                    subject=path,
                    expected=f"a {kind} of {size} pixels as its camera says, {MAX_IMAGE_SIDE} a side at most",
                    found=encoded.size,
                )
            if kind == "picture":
                return np.array(open_image(content, str(path), upright=False).convert("RGB"), dtype=np.uint8)
            if encoded.mode in ("1", "P"):
                plain = encoded.convert("L")
            else:  # PIL would cut 16 bits off at 255
                plain = to_rgb8(encoded, upright=False) if encoded.mode.startswith("I") else encoded
            return np.array(plain.getchannel(len(plain.getbands()) - 1).convert("L"), dtype=np.uint8)[
                ..., None
            ]
    except InputError:
        raise
    except DECODE_ERRORS as error:
        raise LayoutError(subject=path, expected=f"a {kind}", found=error) from error
