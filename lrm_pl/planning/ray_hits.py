"""Fraction of rays that hit the bounds of the renderer. The cost of rendering is proportional to this fraction."""

import contextlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.manifest import MANIFEST_NAME
from lrm_pl.data.mixture import Mixture
from lrm_pl.data.order import SampleLocation
from lrm_pl.data.reader import ShardReader
from lrm_pl.data.schema import SampleError
from lrm_pl.data.transforms import CropConfig
from lrm_pl.errors import counted
from lrm_pl.geometry.cameras import canonicalize, orbit
from lrm_pl.geometry.rays import Bounds, pixel_rays, ray_interval

#: Number of objects whose cameras are read, and number of views per object.
_OBJECTS, _VIEWS = 8, 4

#: Number of sizes of the resized view to evaluate, and maximum side length of a crop and of a view in pixels.
_SIZES, _MAX_CROP, _MAX_VIEW = 16, 32, 256


class Cameras(NamedTuple):
    """Cameras of target views.

    Attributes:
        c2w: Camera-to-world matrices of shape (N, 4, 4).
        fxfycxcy: Normalized intrinsics of shape (N, 4).
        source: Description of the source of the cameras.
    """

    c2w: Float[Tensor, "N 4 4"]
    fxfycxcy: Float[Tensor, "N 4"]
    source: str


def default_cameras() -> Cameras:
    """Return cameras with a field of view of 50 degrees, at the distance at which the unit sphere fits the image."""
    half = math.radians(25)
    focal = 0.5 / math.tan(half)
    fxfycxcy = torch.tensor([focal, focal, 0.5, 0.5]).expand(_VIEWS, 4)
    return Cameras(
        orbit(_VIEWS, 1 / math.sin(half)), fxfycxcy, "assumed: 50 degrees, unit sphere fits the image"
    )


def training_cameras(data: ShardDataModule) -> Cameras:
    """Return the cameras of a few training objects.

    If a data set is not a local folder, or if no object can be read, the default cameras are returned.

    Raises:
        InputError: A local data set is damaged.
    """
    if not all((Path(dataset.folder) / MANIFEST_NAME).is_file() for dataset in data.sets):
        return default_cameras()
    entries = Mixture(data.sets).entries("train", repeated=True)
    locations = [
        SampleLocation(0, i, k) for i, entry in enumerate(entries) for k in range(entry.shard.samples)
    ]
    reader, c2w, fxfycxcy = ShardReader(entries), list[Tensor](), list[Tensor]()
    for location in locations[:: max(1, len(locations) // _OBJECTS)][:_OBJECTS]:
        with contextlib.suppress(SampleError):  # training also skips the sample, with a warning
            sample = reader.read(location, [])
            c2w.append(canonicalize(torch.from_numpy(sample.c2w[:_VIEWS])))
            fxfycxcy.append(torch.from_numpy(sample.fxfycxcy[:_VIEWS]))
    if not c2w:
        return default_cameras()
    return Cameras(torch.cat(c2w), torch.cat(fxfycxcy), f"cameras of {counted(len(c2w), 'training object')}")


def hit_fraction(bounds: Bounds, crop: CropConfig, cameras: Cameras) -> float:
    """Return the fraction of rays of random target crops that hit the bounds.

    As in ``data.transforms``, a view is resized to a random side length and then cropped. A foreground crop is centered
    on a pixel whose ray hits the bounds.
    """
    count = min(_SIZES, crop.high - crop.low + 1)
    sides = [crop.low + (k + 0.5) / count * (crop.high - crop.low) for k in range(count)]
    fractions = [_hit_fraction_at_scale(bounds, side / crop.size, crop, cameras) for side in sides]
    return sum(fractions) / len(fractions)


def _hit_fraction_at_scale(bounds: Bounds, ratio: float, crop: CropConfig, cameras: Cameras) -> float:
    """Return the fraction of rays that hit the bounds for views that are ``ratio`` times as large as the crop."""
    size = max(1, min(_MAX_CROP, round(_MAX_VIEW / ratio)))
    side = max(size, round(size * ratio)) if size > 1 else _MAX_VIEW
    near, far = ray_interval(*pixel_rays(cameras.c2w, cameras.fxfycxcy, side, side), bounds)
    hit = far > near
    crops = F.avg_pool2d(hit.float().unsqueeze(1), size, stride=1).squeeze(1)
    anywhere = crops.mean().item()
    view, row, column = hit.nonzero().unbind(-1)
    if not crop.foreground or not len(view):
        return anywhere
    top, left = ((x - size // 2).clamp(0, side - size) for x in (row, column))
    return crop.foreground * crops[view, top, left].mean().item() + (1 - crop.foreground) * anywhere
