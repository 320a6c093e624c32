"""Creation of grid images and videos from the frames of an orbit."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lrm_pl.errors import InputError

#: Frames per second of orbit videos.
FPS = 20


def make_grid(
    input_image: Image.Image, frames: Sequence[UInt8[np.ndarray, "S S 3"]], columns: int = 4
) -> Image.Image:
    """Arrange the input image and evenly spaced frames of an orbit in two rows.

    Args:
        input_image: RGBA image, which is composited over white.
        frames: Frames of the orbit.
        columns: Number of images per row.
    """
    side = len(frames[0])
    white = Image.new("RGBA", input_image.size, "white")
    first = Image.alpha_composite(white, input_image).convert("RGB").resize((side, side))
    count = 2 * columns - 1
    cells = [np.asarray(first), *(frames[k * len(frames) // count] for k in range(count))]
    rows = [np.concatenate(cells[start : start + columns], axis=1) for start in (0, columns)]
    return Image.fromarray(np.concatenate(rows, axis=0))


def encode_video(frames: Sequence[UInt8[np.ndarray, "S S 3"]]) -> bytes:
    """Encode frames as an MP4 file with VP9, which is a royalty-free codec that all browsers support.

    Raises:
        InputError: OpenCV is not installed or has no VP9 encoder.
    """
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            expected="an installation of OpenCV to encode videos",
            found="none",
            remedy="install it with pip install -e '.[infer]', or disable the orbit with --frames 0",
        ) from error
    height, width = frames[0].shape[:2]
    with tempfile.TemporaryDirectory(prefix="lrm-orbit-") as folder:
        path = Path(folder) / "orbit.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"vp09"), FPS, (width, height))
        if not writer.isOpened():
            raise InputError(
                expected="OpenCV with a VP9 encoder", found=f"OpenCV {cv2.__version__} without this encoder"
            )
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()
        return path.read_bytes()


def encode_gif(frames: Sequence[UInt8[np.ndarray, "S S 3"]]) -> bytes:
    """Encode frames as an animated GIF, which TensorBoard displays."""
    images = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=1000 // FPS, loop=0)
    return file.getvalue()
