"""Synthetic shards of analytic objects for tests, which can be written quickly and without Blender.

Each object is an axis-aligned ellipsoid inside the unit sphere. The color is a linear function of the position, and
alpha is 0 or 255.
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from lrm_pl.data.manifest import Manifest, Split, write_manifest
from lrm_pl.data.schema import SURFACE_MEMBER, Sample, SampleInfo, encode_image, encode_sample
from lrm_pl.data.surface import SURFACE_POINTS, encode_surface
from lrm_pl.data.tar import write_shard
from lrm_pl.geometry.cameras import look_at

FOV_DEG = 50.0
DISTANCE = 2.6


def write_synthetic_shards(
    folder: Path,
    train: int = 4,
    val: int = 2,
    views: int = 8,
    resolution: int = 32,
    shard_size: int = 2,
    seed: int = 0,
    *,
    surface: bool = False,
) -> Manifest:
    """Write a folder of shards that contain synthetic ellipsoids.

    Args:
        folder: Output folder.
        train: Number of objects in the split "train".
        val: Number of objects in the split "val".
        views: Number of views per object.
        resolution: Side of a view in pixels.
        shard_size: Number of objects per shard.
        seed: Seed of shapes, colors and cameras.
        surface: Whether samples contain surface points and normals.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    counts: dict[Split, int] = {"train": train, "val": val}
    for split, count in counts.items():
        for number, first in enumerate(range(0, count, shard_size)):
            keys = [f"{split}-ellipsoid-{i:03d}" for i in range(first, min(first + shard_size, count))]
            samples = [
                (key, encode_sample(synthetic_sample(key, views, resolution, seed, surface=surface)))
                for key in keys
            ]
            shards.append(write_shard(folder, f"{split}-{number:06d}.tar", split, samples))
    manifest = Manifest(tuple(shards), views, 0, {"renderer": "synthetic", "normalize": "sphere"})
    write_manifest(folder, manifest)
    return manifest


def synthetic_sample(key: str, views: int, resolution: int, seed: int, *, surface: bool = False) -> Sample:
    """Create a sample of an ellipsoid with random shape, colors and cameras.

    Args:
        key: Key of the sample.
        views: Number of views.
        resolution: Side of a view in pixels.
        seed: Seed of shape, color and cameras.
        surface: Whether the sample contains surface points and normals.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    radii = rng.uniform(0.4, 0.95, 3)
    base, slope = rng.uniform(0.2, 0.8, 3), rng.uniform(-0.2, 0.2, (3, 3))
    angles = [(2 * np.pi * (i + rng.random()) / views, rng.uniform(-0.4, 0.6)) for i in range(views)]
    azimuth, elevation = np.array(angles).T
    directions = np.stack(
        [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], axis=-1
    )
    c2w = look_at(torch.from_numpy(DISTANCE * directions)).numpy()
    focal = 0.5 / np.tan(np.radians(FOV_DEG / 2))
    fxfycxcy = np.tile(np.array([focal, focal, 0.5, 0.5], np.float32), (views, 1))
    images = tuple(encode_image(_render(pose, focal, resolution, radii, base, slope)) for pose in c2w)
    info = SampleInfo(key, key, "CC0", "lrm_pl", "synthetic", seed, "synthetic", views)
    extras = {}
    if surface:
        extras[SURFACE_MEMBER] = encode_surface(*ellipsoid_surface(radii, SURFACE_POINTS, rng))
    return Sample(info, c2w.astype(np.float32), fxfycxcy, images, extras)


def ellipsoid_surface(
    radii: npt.NDArray[np.float64], count: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sample points uniformly by area on an axis-aligned ellipsoid.

    Args:
        radii: (3,) radii of the ellipsoid.
        count: Number of points.
        rng: Random generator.

    Returns:
        (``count``, 3) points and (``count``, 3) unit normals.
    """
    unit = rng.normal(size=(16 * count, 3))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    gradient = unit / radii  # gradient of the implicit function
    stretch = np.linalg.norm(gradient, axis=1)  # proportional to area on the ellipsoid per area on the sphere
    kept = np.flatnonzero(rng.random(len(unit)) < stretch * radii.min())[:count]
    assert len(kept) == count, len(kept)
    return unit[kept] * radii, gradient[kept] / stretch[kept, None]


def _render(
    c2w: npt.NDArray[np.float64],
    focal: float,
    resolution: int,
    radii: npt.NDArray[np.float64],
    base: npt.NDArray[np.float64],
    slope: npt.NDArray[np.float64],
) -> npt.NDArray[np.uint8]:
    centers = ((np.arange(resolution) + 0.5) / resolution - 0.5) / focal
    x, y = np.meshgrid(centers, centers)
    directions = np.stack([x, y, np.ones_like(x)], -1) @ c2w[:3, :3].T
    o, d = c2w[:3, 3] / radii, directions / radii  # scaled so that the ellipsoid is the unit sphere
    a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum() - 1
    discriminant = b * b - a * c
    t = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    points = c2w[:3, 3] + t[..., None] * directions
    color = np.clip(base + points @ slope.T, 0, 1)
    rgba = np.concatenate([color, np.ones_like(t)[..., None]], -1) * (discriminant > 0)[..., None]
    return np.round(rgba * 255).astype(np.uint8)
