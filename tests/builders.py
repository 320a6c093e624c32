"""Small networks, images, meshes, batches and shards that several test modules share."""

import base64
import io
import json
import os
import re
import struct
import subprocess
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from skimage.measure import marching_cubes
from torch.utils._python_dispatch import TorchDispatchMode

from data_tools.rendering.settings import RenderSettings
from lrm_pl.cluster.launch import Launch, sbatch_command
from lrm_pl.data.batch import Batch, Views
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.data.manifest import read_index, read_manifest
from lrm_pl.geometry.cameras import orbit
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.kernels.device import GpuProperties
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.lrm import LRM

#: ``fxfycxcy`` of a camera with a field of view of 50 degrees.
CAMERA = torch.tensor([1.07, 1.07, 0.5, 0.5])

#: Config of the smallest run; its encoder has random weights.
TINY = {
    "seed_everything": 0,
    "model": {
        "lrm": {
            "encoder": {"name": "test_vit", "image_size": 32, "frozen": True},
            "decoder": {"channels": 4, "width": 8, "layers": 3},
            "dim": 16,
            "depth": 1,
            "heads": 2,
            "camera_dim": 8,
            "plane_tokens": 4,
        },
        "renderer": {"samples_per_ray": 8},
        "objective": {"lpips": 0.0},
    },
    "data": {
        "batch_size": 2,
        "side_views": 1,
        "unseen_views": 2,
        "workers": 0,
        "streams": 2,
        "crop": {"low": 16, "high": 32, "size": 16},
    },
    "weights": {"pretrained": False, "source": "pypi"},
}

#: The ``model`` section of ``tiny_pretrained``.
TINY_MODEL = {
    "lrm": TINY["model"]["lrm"]
    | {"encoder": {"name": "vit_small_patch14_dinov2", "image_size": 28, "frozen": True}},
    "renderer": {"samples_per_ray": 16},
}
TINY_FRAMING = InputFraming(distance=2.5, fov_deg=45.0, foreground=0.7)


def tiny_pretrained():
    """Return a model with random weights that renders opaque surfaces."""
    torch.manual_seed(0)
    model = LRMPipeline(TINY_MODEL, TINY_FRAMING)
    with torch.no_grad():
        model.network.decoder.layers[-1].weight[0] *= 60
        model.network.decoder.layers[-1].bias[0] += 1
    return model


def tiny_lrm(**options):
    """Return an LRM with a DINOv2 encoder of one block and random weights."""
    torch.manual_seed(0)
    encoder = ImageEncoder("vit_small_patch14_dinov2", 28, frozen=True, dim=32, depth=1, heads=2)
    return LRM(
        encoder,
        NeRFDecoder(channels=4, width=8, layers=3),
        **{"dim": 16, "depth": 2, "heads": 2, "camera_dim": 8, "plane_tokens": 4, **options},
    )


def small_lrm(*, frozen=False, depth=2, plane_tokens=16):
    """Return an LRM whose sizes are large enough to compare operation counts."""
    torch.manual_seed(0)
    encoder = ImageEncoder("vit_tiny_patch16_224", 64, frozen=frozen)
    return LRM(encoder, NeRFDecoder(8, 32, 4), 96, depth, 4, 20, 32, plane_tokens=plane_tokens, upsample=2)


#: A GPU whose renderer is made of plain operators.
V100 = GpuProperties((7, 0), 80, 6 * 2**20)


def make_batch(size=32, views=2):
    """Return a batch of two objects with random images."""
    c2w = orbit(views, 2.4, 12.0).expand(2, -1, 4, 4)
    camera = CAMERA.expand(2, views, 4)

    def some(count):
        alpha = torch.rand(2, count, size, size)
        poses, cameras = c2w[:, :count].contiguous(), camera[:, :count].contiguous()
        return Views(
            torch.rand(2, count, 3, size, size), alpha, torch.ones(2, count, 3), poses, cameras, alpha
        )

    return Batch(("a", "b"), some(1), some(views), torch.ones(2))


class Operators(TorchDispatchMode):
    """Count the calls of each operator."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def encoded(image, kind="PNG", **options):
    """Return a Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, data=b""):
    """Return a PNG file whose header states a size, whatever its data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def wide_profile():
    """Return an ICC profile with the primaries of Display P3 and sRGB's curve, built by hand."""

    def fixed(x):
        return struct.pack(">i", round(x * 65536))

    def xyz(*values):
        return b"XYZ " + bytes(4) + b"".join(map(fixed, values))

    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0)
    curve += b"".join(map(fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    text = b"desc" + bytes(4) + struct.pack(">I", 3) + b"P3\0" + bytes(80)
    tags = {
        b"desc": text, b"wtpt": xyz(0.9642, 1, 0.8249), b"cprt": b"text" + bytes(4) + b"-\0",
        b"rXYZ": xyz(0.5151, 0.2412, -0.0011), b"gXYZ": xyz(0.2919, 0.6922, 0.0419),
        b"bXYZ": xyz(0.1572, 0.0666, 0.7841), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    head = (
        bytes(4)
        + bytes(4)
        + struct.pack(">I", 0x02400000)
        + b"mntrRGB XYZ "
        + bytes(12)
        + b"acsp"
        + bytes(28)
    )
    head += fixed(0.9642) + fixed(1) + fixed(0.8249)
    head += bytes(128 - len(head))
    profile = head + table + body
    return struct.pack(">I", len(profile)) + profile[4:]


#: Centers and radii of the balls of ``lumps``.
BALLS = (np.zeros(3), 0.6), (np.full(3, 0.75), 0.15)


def lumps(points=64):
    """Return the vertices and the outward faces of two balls."""
    axis = np.linspace(-1, 1, points)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    inside = np.maximum(*(radius - np.linalg.norm(grid - center, axis=-1) for center, radius in BALLS))
    places, faces, _, _ = marching_cubes(inside, 0.0, gradient_direction="ascent")
    return (places * 2 / (points - 1) - 1).astype(np.float32), faces.astype(np.int64)


def volume(mesh):
    """Return the signed volume of a closed mesh; positive if its faces point outward."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    return (a * np.cross(b, c)).sum() / 6


def is_closed(mesh):
    """Return whether every edge of a mesh belongs to exactly two faces."""
    edges = np.sort(
        np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]), axis=1
    )
    return (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()


def linear(srgb):
    """Convert sRGB values in [0, 1] to linear ones."""
    srgb = np.asarray(srgb, dtype=np.float64)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def write_gltf(path, parts):
    """Write (vertices, triangles, sRGB color in [0, 1], alpha) parts, +z up, as one matt glTF file."""
    gltf = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}]}
    gltf |= {"meshes": [{"primitives": []}], "accessors": [], "bufferViews": [], "materials": []}
    gltf["extensionsUsed"] = ["KHR_materials_specular"]
    blob = b""
    for vertices, triangles, color, alpha in parts:
        x, y, z = np.asarray(vertices, dtype=np.float32).T
        points = np.stack([x, z, -y], axis=1).astype("<f4")  # glTF is +y up
        corners = np.asarray(triangles, dtype="<u4").reshape(-1)
        for data, kind, component in ((points, "VEC3", 5126), (corners, "SCALAR", 5125)):
            view = {"buffer": 0, "byteOffset": len(blob), "byteLength": data.nbytes}
            accessor = {"bufferView": len(gltf["bufferViews"]), "componentType": component, "type": kind}
            accessor["count"] = len(data)
            if kind == "VEC3":
                accessor |= {"min": points.min(0).tolist(), "max": points.max(0).tolist()}
            gltf["bufferViews"].append(view)
            gltf["accessors"].append(accessor)
            blob += data.tobytes()
        last = len(gltf["accessors"])
        primitive = {"attributes": {"POSITION": last - 2}, "indices": last - 1}
        primitive["material"] = len(gltf["materials"])
        gltf["meshes"][0]["primitives"].append(primitive)
        rgba = [*linear(color).tolist(), alpha]
        surface = {"baseColorFactor": rgba, "metallicFactor": 0.0, "roughnessFactor": 1.0}
        matt = {"KHR_materials_specular": {"specularFactor": 0.0}}
        material = {"pbrMetallicRoughness": surface, "doubleSided": True, "extensions": matt}
        gltf["materials"].append(material | ({"alphaMode": "BLEND"} if alpha < 1 else {}))
    uri = "data:application/octet-stream;base64," + base64.b64encode(blob).decode()
    gltf["buffers"] = [{"byteLength": len(blob), "uri": uri}]
    path.write_text(json.dumps(gltf))


def box(center, half):
    """Return the (8, 3) corners and (12, 3) triangles of an axis-aligned box."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = [t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]
    return np.asarray(center) + signs * np.asarray(half), np.array(triangles)


def spoil_first_poses(tar):
    """Corrupt the poses of the first object of a shard; the file's size and its index stay valid."""
    content = bytearray(tar.read_bytes())
    start = content.index(b"\x93NUMPY")
    content[start : start + 6] = b"corrup"
    tar.write_bytes(bytes(content))


def members(folder):
    """Return all samples of a folder: key -> (split, member -> bytes)."""
    found = {}
    for shard in read_manifest(folder).shards:
        content = (folder / shard.name).read_bytes()
        for key, spans in read_index(folder, shard).items():
            found[key] = shard.split, {name: content[at : at + size] for name, (at, size) in spans.items()}
    return found


def cells(output, row):
    """Return the numbers in a row of a printed table."""
    (line,) = [line for line in output.splitlines() if re.match(rf"│ {re.escape(row)} +│", line)]
    return [float(number) for number in re.findall(r"[\d.]*\d", line.split("│", 2)[2].replace(",", ""))]


#: Settings of the smallest rendering.
RENDER_SETTINGS = RenderSettings(
    preset="frame", normalize="sphere", views=2, resolution=8, samples=1, seed=0, held_out=1, shard_size=2
)

#: A program that takes the place of Blender.
STAND_IN_WORKER = Path(__file__).parent / "data_tools" / "stand_in_worker.py"


def read_tars(folder):
    """Return name -> bytes of the shards of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def a_launch(**changes):
    fields = {
        "nodes": 2,
        "processes": 8,
        "gpus": 8,
        "layers": ("configs/trainer/ddp.yaml", "mine.yaml"),
        "data": "data/mine",
        "run": Path("runs/mine-1"),
        "arguments": (),
    }
    return Launch(**fields | changes)


def command_of(launch, **changes):
    options = {"cpus": 6, "cache": Path("/cache"), "partition": "gpu", "account": "lab", "time": "1-00:00:00"}
    return sbatch_command(launch, ["python", *launch.fit_command()], **options | changes)


SCRIPT = "configs/cluster/slurm.sbatch"


def run_job(checkout, stand_ins, launch, **changes):
    """Start the job script with bash, after shell functions that replace programs of Slurm."""
    command = command_of(launch, **changes)
    (checkout / "job.sh").write_text(stand_ins + (checkout / SCRIPT).read_text())
    environment = os.environ | {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n0", "SLURM_CPUS_PER_TASK": "6"}
    return subprocess.Popen(
        ["bash", "job.sh", *command[command.index(SCRIPT) + 1 :]],
        cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
