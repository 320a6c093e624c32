"""Layout of MVImgNet's videos (github.com/GAP-LAB-CUHK-SZ/MVImgNet), cropped to the object as in LRM (section 4.1).

    <category>/<instance>/images/001.jpg
    <category>/<instance>/sparse/0/{cameras,images}.bin         COLMAP; missing for some instances; sparse/1 is not used
    MASKS/<category>/<instance>/001.jpg.png                     masks of MVImgNet, a separate download
    <category>/<instance>/masks/001.jpg.png                     masks of MVImgNet 2.0

A view is the square around its mask with a margin. Pixels outside the mask or the image are transparent, and the
intrinsics are those of the square. ``object_frame`` normalizes the world; camera distances vary with the video.

A view is usable if its image and mask exist and the mask does not touch the image border, where the object would be
cropped. Evenly spaced usable views are selected.
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

#: Margin on each side of the mask, relative to its longer side.
MARGIN = 0.1

#: Maximum displacement of a corner of the crop by lens distortion, relative to its side.
MAX_DISTORTION = 0.01


@dataclasses.dataclass(frozen=True)
class Frame:
    """A usable view.

    Attributes:
        posed: Pose and intrinsics.
        image: File of the image.
        mask: File of its mask.
        corner: Left and top of the crop in pixels, possibly outside the image.
        side: Side of the crop in pixels.
        outline: Outline of the object.
    """

    posed: PosedImage
    image: Path
    mask: Path
    corner: tuple[int, int]
    side: int
    outline: ObjectOutline


def find_objects(root: Path) -> list[Path]:
    """List the object folders below ``root``."""
    return find_folders(root, "images|sparse")


def read_object(folder: Path, masks: Path, views: int, resolution: int) -> PosedViews:
    """Read the views of an object.

    Args:
        folder: Folder of the object.
        masks: Folder of its masks.
        views: Number of views.
        resolution: Side of the crops, pixels.

    Raises:
        LayoutError: A file is invalid, or there are too few usable views.
    """
    found = [_frame(image, folder / "images", masks) for image in read_model(folder / "sparse" / "0")]
    frames = [frame for frame in found if isinstance(frame, Frame)]
    if len(frames) < views:
        lost = Counter(frame for frame in found if isinstance(frame, str))
        reasons = ", ".join(f"{count} {reason}" for reason, count in lost.items())
        raise LayoutError(
            subject=folder,
            expected=f"at least {views} usable views",
            found=f"{len(frames)} of {len(found)} ({reasons})",
        )
    frames = [frames[i * len(frames) // views] for i in range(views)]
    return PosedViews(
        c2w=to_object_frame([frame.outline for frame in frames], str(folder)).astype(np.float32),
        fxfycxcy=np.stack([_intrinsics(frame) for frame in frames]).astype(np.float32),
        views=tuple(_crop(frame, resolution) for frame in frames),
    )


def _frame(posed: PosedImage, images: Path, masks: Path) -> Frame | str:
    """Return the crop of a view, or the reason why the view is not usable."""
    if Path(posed.name).name != posed.name:
        raise LayoutError(subject=images, expected="plain file names in images.bin", found=f"{posed.name!r}")
    image, mask = images / posed.name, masks / f"{posed.name}.png"
    if not image.is_file():
        return "without an image"
    if not mask.is_file():
        return "without a mask"
    solid = _decode(mask, "mask", posed)[..., 0] > 127
    if not solid.any():
        return "with an empty mask"
    if solid[[0, -1]].any() or solid[:, [0, -1]].any():
        return "cropped by the image border"
    rows = np.flatnonzero(solid.any(axis=1))
    first, last = solid[rows].argmax(axis=1), solid.shape[1] - solid[rows, ::-1].argmax(axis=1)
    low, high = np.array([first.min(), rows[0]]), np.array([last.max(), rows[-1] + 1])
    side = int(np.ceil((high - low).max() * (1 + 2 * MARGIN)))
    left, top = (int(x) for x in np.floor((low + high - side) / 2))
    corners = np.array([(x, y) for x in (left, left + side) for y in (top, top + side)], dtype=np.float64)
    displacement = float(posed.camera.displacement(corners).max()) / side
    if displacement > MAX_DISTORTION:
        raise LayoutError(
            subject=image,
            expected=f"lens distortion of at most {MAX_DISTORTION:.0%} of the crop",
            found=f"{displacement:.1%}",
            remedy="undistort the images with COLMAP's image_undistorter",
        )
    # The two ends of each row of the mask contain all extreme points.
    outline = np.concatenate([np.stack([first, rows + 0.5], axis=1), np.stack([last, rows + 0.5], axis=1)])
    rays, center = _rays(posed, outline), _rays(posed, (low + high)[None] / 2)[0]
    return Frame(posed, image, mask, (left, top), side, ObjectOutline(posed.c2w, rays, center))


def _rays(posed: PosedImage, pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the unit world directions of (N, 2) pixels."""
    camera = posed.camera
    x, y = (pixels[:, 0] - camera.cx) / camera.fx, (pixels[:, 1] - camera.cy) / camera.fy
    rays = np.stack([x, y, np.ones_like(x)], axis=1) @ posed.c2w[:3, :3].T
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _intrinsics(frame: Frame) -> npt.NDArray[np.float64]:
    camera, (left, top) = frame.posed.camera, frame.corner
    return np.array([camera.fx, camera.fy, camera.cx - left, camera.cy - top]) / frame.side


def _crop(frame: Frame, resolution: int) -> bytes:
    """Crop the square with the mask as alpha, resize and encode it."""
    rgb, alpha = _decode(frame.image, "image", frame.posed), _decode(frame.mask, "mask", frame.posed)
    left, top = frame.corner
    whole = Image.fromarray(np.concatenate([rgb, alpha], axis=2))
    square = whole.crop((left, top, left + frame.side, top + frame.side))
    # Premultiplied, so that no background bleeds in. BOX would shift pixels for non-integer ratios of sizes.
    small = square.convert("RGBa").resize((resolution, resolution), Image.Resampling.HAMMING)
    return encode_image(np.array(small.convert("RGBA"), dtype=np.uint8))


def _decode(path: Path, content_type: Literal["image", "mask"], posed: PosedImage) -> npt.NDArray[np.uint8]:
    """Decode an image to (H, W, 3) sRGB, or a mask (its alpha, else its last channel) to (H, W, 1).

    The EXIF orientation is ignored: COLMAP's camera refers to the stored pixels.
    """
    size, content = (posed.camera.width, posed.camera.height), read_file(path)
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as encoded:
            if encoded.size != size or max(size) > MAX_IMAGE_SIDE:
                raise LayoutError(
                    subject=path,
                    expected=f"the camera's {size[0]} x {size[1]} pixels, at most {MAX_IMAGE_SIDE} per side",
                    found=f"{encoded.size[0]} x {encoded.size[1]}",
                )
            if content_type == "image":
                return np.array(open_image(content, str(path), upright=False).convert("RGB"), dtype=np.uint8)
            if encoded.mode in ("1", "P"):
                plain = encoded.convert("L")
            else:  # Pillow clips 16 bits at 255
                plain = to_rgb8(encoded, upright=False) if encoded.mode.startswith("I") else encoded
            return np.array(plain.getchannel(len(plain.getbands()) - 1).convert("L"), dtype=np.uint8)[
                ..., None
            ]
    except InputError:
        raise
    except DECODE_ERRORS as error:
        raise LayoutError(f"{path}: the {content_type} cannot be decoded: {error}") from error
