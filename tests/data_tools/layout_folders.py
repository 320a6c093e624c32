"""Folders in the layouts of OpenLRM, Zero-1-to-3 and InstantMesh, and their conversion."""

import json
import struct
import zlib

import numpy as np
import pytest

from data_tools.layouts.registry import get_layout
from data_tools.shards.convert import convert
from lrm_pl.data.manifest import read_samples
from lrm_pl.data.schema import decode_sample
from lrm_pl.data.synthetic import synthetic_sample

VIEWS = 6


#: Conversion between OpenGL axes (x right, y up, z backward) and OpenCV axes (x right, y down, z forward).
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


def opengl_w2c(sample):
    return np.linalg.inv(sample.c2w.astype(np.float64) @ FLIP)


def write_images(folder, sample):
    folder.mkdir(parents=True, exist_ok=True)
    for number, view in enumerate(sample.views):
        (folder / f"{number:03d}.png").write_bytes(view)


def write_openlrm(folder, sample):
    write_images(folder / "rgba", sample)
    (folder / "pose").mkdir()
    for number, c2w in enumerate(sample.c2w):
        np.save(folder / "pose" / f"{number:03d}.npy", (c2w @ FLIP)[:3])
    (fx, fy, cx, cy), (width, height) = (
        sample.fxfycxcy[0],
        (1024, 1024),
    )  # the images were made smaller since
    np.save(
        folder / "intrinsics.npy", [[fx * width, fy * height], [cx * width, cy * height], [width, height]]
    )


def write_zero123(folder, sample):
    write_images(folder, sample)
    for number, w2c in enumerate(opengl_w2c(sample)):
        w2c[:3, 3] /= 2  # the longest side of the object is 1
        np.save(folder / f"{number:03d}.npy", w2c[:3])


def write_instantmesh(folder, sample, poses=None):
    write_images(folder, sample)
    (folder / "000_normal.png").write_bytes(sample.views[0])
    (folder / "000_depth.png").write_bytes(sample.views[0])
    np.savez(folder / "cameras.npz", cam_poses=opengl_w2c(sample)[:, :3] if poses is None else poses)


#: Parametrization of tests of code that all layouts share.
ONE_LAYOUT = pytest.mark.parametrize(
    "layout",
    ["zero123", *(pytest.param(name, marks=pytest.mark.soak) for name in ("openlrm", "instantmesh"))],
    indirect=True,
)

WRITERS = {"openlrm": write_openlrm, "zero123": write_zero123, "instantmesh": write_instantmesh}


def ellipsoid(key):
    return synthetic_sample(key, VIEWS, 32, 0)


def converted(layout, root, out, **options):
    manifest = convert(get_layout(layout, root), root, out, **options)
    samples = {}
    for shard in manifest.shards:
        for key, members in read_samples(out, shard):
            samples[key] = decode_sample(key, members)
    return samples


def reasons(out):
    records = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    return {record["id"]: record["reason"] for record in records}


def an_image(folder, layout):
    return (folder / "rgba" if layout == "openlrm" else folder) / "003.png"


def png_chunk(content, kind, data):
    """Insert a chunk before the first data chunk of a PNG file."""
    at = content.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content[:at] + chunk + content[at:]
