"""Layout of MVImgNet videos (github.com/GAP-LAB-CUHK-SZ/MVImgNet), which are cropped as in LRM (section 4.1).

    <category>/<instance>/images/001.jpg                        video frame
    <category>/<instance>/sparse/0/{cameras,images}.bin         COLMAP model, which some instances do not have
    MASKS/<category>/<instance>/001.jpg.png                     mask of MVImgNet, which is a separate download
    <category>/<instance>/masks/001.jpg.png                     mask of MVImgNet 2.0

A view is cropped to a square around the mask with a margin, and the intrinsics refer to the square. Pixels outside the
mask or the image are transparent. ``object_frame`` normalizes the cameras. The normalized camera distance
differs between videos.

A frame is usable if the image and the mask exist and the mask does not touch the image border, where a part of the
object could be missing. The views are selected evenly from the usable frames. COLMAP models in ``sparse/1`` are not
used.
"""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_tools.layouts.colmap import PosedImage, read_model
from data_tools.layouts.files import LayoutError, PosedViews
from data_tools.layouts.object_frame import ObjectOutline, to_object_frame
from lrm_pl.data.schema import encode_image
from lrm_pl.images import open_image

#: Regular expression for the folders that an object folder contains.
OBJECT_NAMES = "images|sparse"

#: Margin on each side of the mask, as a fraction of the longer side of the mask.
MARGIN = 0.1

#: Maximum displacement of a corner of the crop by lens distortion, as a fraction of the side of the crop.
MAX_DISTORTION = 0.01


@dataclasses.dataclass(frozen=True)
class Frame:
    """A usable frame of a video.

    Attributes:
        posed: Pose and intrinsics.
        image: Path of the image.
        mask: Path of the mask.
        corner: Pixel coordinates (left, top) of the crop, which can be outside the image.
        side: Side of the crop in pixels.
        outline: Outline of the object.
    """

    posed: PosedImage
    image: Path
    mask: Path
    corner: tuple[int, int]
    side: int
    outline: ObjectOutline


def read_object(folder: Path, root: Path, masks: Path | None, views: int, resolution: int) -> PosedViews:
    """Read the views of an object.

    Args:
        folder: Folder of the object.
        root: Folder of the data set.
        masks: Folder of the masks of all objects. If None, the folder ``masks`` of the object is used.
        views: Number of views.
        resolution: Width and height of the views in pixels.

    Raises:
        LayoutError: A file is invalid, or there are fewer than ``views`` usable frames.
    """
    own_masks = folder / "masks" if masks is None else masks / folder.relative_to(root)
    found = [_frame(image, folder / "images", own_masks) for image in read_model(folder / "sparse" / "0")]
    frames = [frame for frame in found if isinstance(frame, Frame)]
    if len(frames) < views:
        lost = Counter(frame for frame in found if isinstance(frame, str))
        reasons = ", ".join(f"{count} {reason}" for reason, count in lost.items())
        total = f"{len(frames)} of {len(found)} ({reasons})"
        raise LayoutError(f"at least {views} usable views", total, subject=folder)
    frames = [frames[i * len(frames) // views] for i in range(views)]
    return PosedViews(
        c2w=to_object_frame([frame.outline for frame in frames], str(folder)).astype(np.float32),
        fxfycxcy=np.stack([_intrinsics(frame) for frame in frames]).astype(np.float32),
        views=tuple(_crop(frame, resolution) for frame in frames),
    )


def _frame(posed: PosedImage, images: Path, masks: Path) -> Frame | str:
    """Return a frame, or the reason why it is not usable."""
    if Path(posed.name).name != posed.name:
        raise LayoutError(
            subject=images, expected="file names without folders in images.bin", found=f"{posed.name!r}"
        )
    image, mask = images / posed.name, masks / f"{posed.name}.png"
    if not image.is_file():
        return "without an image"
    if not mask.is_file():
        return "without a mask"
    solid = np.asarray(_open_mask(mask, posed)) > 127
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
        expected = f"lens distortion of at most {MAX_DISTORTION:.0%} of the side of the crop"
        remedy = "undistort the images with COLMAP's image_undistorter"
        raise LayoutError(expected, f"{displacement:.1%}", remedy, image)
    # The ends of the rows of the mask include all vertices of the convex hull.
    outline = np.concatenate([np.stack([first, rows + 0.5], axis=1), np.stack([last, rows + 0.5], axis=1)])
    rays, center = _rays(posed, outline), _rays(posed, (low + high)[None] / 2)[0]
    return Frame(posed, image, mask, (left, top), side, ObjectOutline(posed.c2w, rays, center))


def _rays(posed: PosedImage, pixels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Convert pixel coordinates of shape (N, 2) to unit ray directions of shape (N, 3) in world coordinates."""
    camera = posed.camera
    x, y = (pixels[:, 0] - camera.cx) / camera.fx, (pixels[:, 1] - camera.cy) / camera.fy
    rays = np.stack([x, y, np.ones_like(x)], axis=1) @ posed.c2w[:3, :3].T
    return rays / np.linalg.norm(rays, axis=1, keepdims=True)


def _intrinsics(frame: Frame) -> npt.NDArray[np.float64]:
    camera, (left, top) = frame.posed.camera, frame.corner
    return np.array([camera.fx, camera.fy, camera.cx - left, camera.cy - top]) / frame.side


def _crop(frame: Frame, resolution: int) -> bytes:
    """Crop a frame with the mask as alpha, resize the crop, and return the encoded image."""
    whole = _open(frame.image, frame.posed).convert("RGB")
    whole.putalpha(_open_mask(frame.mask, frame.posed))
    left, top = frame.corner
    square = whole.crop((left, top, left + frame.side, top + frame.side))
    # Premultiplied alpha excludes the background. BOX would shift pixels if the ratio of the sizes is not an integer.
    small = square.convert("RGBa").resize((resolution, resolution), Image.Resampling.HAMMING)
    return encode_image(np.array(small.convert("RGBA"), dtype=np.uint8))


def _open(path: Path, posed: PosedImage) -> Image.Image:
    """Open an image in sRGB. The EXIF orientation is ignored, because the cameras refer to the stored pixels."""
    image, camera = open_image(path, upright=False), posed.camera
    if image.size != (camera.width, camera.height):
        expected = f"{camera.width} x {camera.height} pixels according to the camera"
        raise LayoutError(expected, f"{image.width} x {image.height}", subject=path)
    return image


def _open_mask(path: Path, posed: PosedImage) -> Image.Image:
    """Return the last channel of a mask, which is the alpha channel if the mask has one."""
    return _open(path, posed).split()[-1]
