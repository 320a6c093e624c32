"""Images of a reconstructed object: the grid, and the orbit as a video."""

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from lrm_pl.errors import InputError

#: Frames of an orbit a second.
FRAMES_A_SECOND = 20


def grid(
    input_image: Image.Image, frames: Sequence[UInt8[np.ndarray, "S S 3"]], columns: int = 4
) -> Image.Image:
    """Lay out the input, over white, and views evenly spread over an orbit: two rows.

    Args:
        input_image: RGBA.
        frames: Frames of the orbit.
        columns: Images a row.
    """
    side = len(frames[0])
    white = Image.new("RGBA", input_image.size, "white")
    first = Image.alpha_composite(white, input_image).convert("RGB").resize((side, side))
    count = 2 * columns - 1
    cells = [np.asarray(first), *(frames[k * len(frames) // count] for k in range(count))]
    rows = [np.concatenate(cells[start : start + columns], axis=1) for start in (0, columns)]
    return Image.fromarray(np.concatenate(rows, axis=0))


def encode_video(frames: Sequence[UInt8[np.ndarray, "S S 3"]]) -> bytes:
    """Encode frames as mp4 (VP9: free, and every browser plays it).

    Raises:
        InputError: OpenCV is not installed, or cannot encode it.
    """
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            expected="OpenCV to write a video",
            found="none",
            remedy="pip install -e '.[infer]', or leave it out (--frames 0)",
        ) from error
    height, width = frames[0].shape[:2]
    descriptor, path = tempfile.mkstemp(suffix=".mp4", prefix="lrm-orbit-")
    os.close(descriptor)
    try:
        writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"vp09"), FRAMES_A_SECOND, (width, height))
        if not writer.isOpened():
            raise InputError(expected="an OpenCV that encodes VP9", found=f"{cv2.__version__} that does not")
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()
        return Path(path).read_bytes()
    finally:
        Path(path).unlink(missing_ok=True)


def encode_gif(frames: Sequence[UInt8[np.ndarray, "S S 3"]]) -> bytes:
    """Encode frames as an animated GIF: TensorBoard plays it."""
    images = [Image.fromarray(frame).quantize(64, dither=Image.Dither.NONE) for frame in frames]
    file = io.BytesIO()
    images[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=1000 // FRAMES_A_SECOND,
        loop=0,
    )
    return file.getvalue()
