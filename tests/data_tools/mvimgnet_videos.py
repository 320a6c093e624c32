"""Videos in the layout of MVImgNet with a COLMAP model, and their conversion."""

import json
import struct

import numpy as np
import pytest
from PIL import Image

from data_tools.layouts.registry import get_layout
from data_tools.shards.convert import convert
from lrm_pl.data.manifest import read_samples
from lrm_pl.data.schema import decode_image, decode_sample

FRAMES, SIDE = 10, 128


#: Rotation, scale and translation of the world in COLMAP. The axes are permuted and rotated around z.
TURN = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]]) @ np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])


SCALE, OFFSET = 7.0, np.array([3.0, -20.0, 11.0])


SIMPLE_PINHOLE, PINHOLE, SIMPLE_RADIAL, RADIAL, OPENCV, FISHEYE = range(6)


def quaternion(rotation):
    """Return the quaternion (w, x, y, z) of a rotation, which is an eigenvector of the matrix of Bar-Itzhack."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    k = np.array([
        [a + e + i, h - f, c - g, d - b],
        [h - f, a - e - i, b + d, c + g],
        [c - g, b + d, e - a - i, f + h],
        [d - b, c + g, f + h, i - a - e],
    ])  # fmt: skip
    return np.linalg.eigh(k)[1][:, -1]


def write_model(folder, poses, parameters, model=PINHOLE):
    """Write a COLMAP model with world-to-camera poses and some points in each image."""
    folder.mkdir(parents=True)
    camera = struct.pack(f"<QIiQQ{len(parameters)}d", 1, 5, model, SIDE, SIDE, *parameters)
    (folder / "cameras.bin").write_bytes(camera)
    images = struct.pack("<Q", len(poses))
    for number in reversed(range(len(poses))):  # not sorted by name
        images += struct.pack(
            "<I7dI", number + 1, *quaternion(poses[number][:3, :3]), *poses[number][:3, 3], 5
        )
        images += f"{number + 1:03d}.jpg".encode() + b"\0" + struct.pack("<Q", number)
        images += struct.pack("<ddq", 1.0, 2.0, -1) * number
    (folder / "images.bin").write_bytes(images)


def write_video(folder, sample, masks, parameters=None, model=PINHOLE):
    """Write a sample as a video with JPEG images over a background, masks and a COLMAP model."""
    poses = []
    for c2w in sample.c2w.astype(np.float64):
        rotation, place = TURN @ c2w[:3, :3], SCALE * TURN @ c2w[:3, 3] + OFFSET
        poses.append(np.column_stack([rotation.T, -rotation.T @ place]))
    write_model(folder / "sparse" / "0", poses, parameters or sample.fxfycxcy[0] * SIDE, model)
    (folder / "images").mkdir()
    masks.mkdir(parents=True, exist_ok=True)
    for number, view in enumerate(sample.views, start=1):
        rgba = decode_image("a", view)
        image = np.where(rgba[..., 3:] > 0, rgba[..., :3], [0, 255, 0]).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number:03d}.jpg", quality=98, subsampling=0)
        Image.fromarray(rgba[..., 3]).save(masks / f"{number:03d}.jpg.png")


def converted(root, out, views=FRAMES, resolution=64, masks=None):
    manifest = convert(get_layout("mvimgnet", root, resolution, views, masks), root, out)
    return {
        key: decode_sample(key, members)
        for shard in manifest.shards
        for key, members in read_samples(out, shard)
    }


def reason(folder, out, views=FRAMES):
    """Convert a folder with one invalid object, and return the reason."""
    root = folder.parents[1]
    with pytest.raises(ValueError, match="found none among 1 object"):
        converted(root, out, views)
    (record,) = [json.loads(line) for line in (out.parent / "out.failures.jsonl").read_text().splitlines()]
    assert record["id"] == f"{folder.parent.name}_{folder.name}"
    return record["reason"]


def missing(path):
    path.unlink()
