"""Fraction of rays that hit the renderer's bounds, which what rendering costs is proportional to."""

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

#: Objects whose cameras are read, and views of each.
_OBJECTS, _VIEWS = 8, 4

#: Sides of the resized view that stand for all, pixels of a window's side, and the most of a view's.
_SIDES, _WINDOW, _LARGEST = 16, 32, 256


class Cameras(NamedTuple):
    """Cameras of target views.

    Attributes:
        c2w: Poses.
        fxfycxcy: Normalized intrinsics.
        source: Where they are from.
    """

    c2w: Float[Tensor, "N 4 4"]
    fxfycxcy: Float[Tensor, "N 4"]
    source: str


def default_cameras() -> Cameras:
    """Return cameras of 50 degrees at the distance from which the unit sphere fits the image: 1 / sin(25 degrees)."""
    half = math.radians(25)
    focal = 0.5 / math.tan(half)
    fxfycxcy = torch.tensor([focal, focal, 0.5, 0.5]).expand(_VIEWS, 4)
    return Cameras(orbit(_VIEWS, 1 / math.sin(half)), fxfycxcy, "assumed: 50 degrees, sphere fits the image")


def cameras_of(data: ShardDataModule) -> Cameras:
    """Return the cameras of a few training objects where all data sets are local folders, else the default ones.

    Raises:
        InputError: A data set that is there is damaged.
    """
    if not all((Path(one.folder) / MANIFEST_NAME).is_file() for one in data.sets):
        return default_cameras()
    entries = Mixture(data.sets).entries("train", repeated=True)
    places = [SampleLocation(0, i, k) for i, entry in enumerate(entries) for k in range(entry.shard.samples)]
    reader, c2w, fxfycxcy = ShardReader(entries), list[Tensor](), list[Tensor]()
    for place in places[:: max(1, len(places) // _OBJECTS)][:_OBJECTS]:
        with contextlib.suppress(SampleError):  # training leaves it out as well, and says so
            sample = reader.read(place, [])
            c2w.append(canonicalize(torch.from_numpy(sample.c2w[:_VIEWS])))
            fxfycxcy.append(torch.from_numpy(sample.fxfycxcy[:_VIEWS]))
    if not c2w:
        return default_cameras()
    return Cameras(torch.cat(c2w), torch.cat(fxfycxcy), f"cameras of {counted(len(c2w), 'training object')}")


def hit_share(bounds: Bounds, crop: CropConfig, cameras: Cameras) -> float:
    """Return the share of the rays of random target windows that hit the bounds.

    A view is resized to a random side and a window is cut from it, as ``data.transforms`` does. Windows that are
    centered on the object are centered on a pixel that hits the bounds.
    """
    count = min(_SIDES, crop.high - crop.low + 1)
    sides = [crop.low + (k + 0.5) / count * (crop.high - crop.low) for k in range(count)]
    shares = [_share_of_side(bounds, side / crop.size, crop, cameras) for side in sides]
    return sum(shares) / len(shares)


def _share_of_side(bounds: Bounds, ratio: float, crop: CropConfig, cameras: Cameras) -> float:
    """Return the share for windows of which ``ratio`` make a view's side."""
    window = max(1, min(_WINDOW, round(_LARGEST / ratio)))
    side = max(window, round(window * ratio)) if window > 1 else _LARGEST
    near, far = ray_interval(*pixel_rays(cameras.c2w, cameras.fxfycxcy, side, side), bounds)
    hit = far > near
    windows = F.avg_pool2d(hit.float().unsqueeze(1), window, stride=1).squeeze(1)
    anywhere = windows.mean().item()
    view, row, column = hit.nonzero().unbind(-1)
    if not crop.foreground or not len(view):
        return anywhere
    top, left = ((x - window // 2).clamp(0, side - window) for x in (row, column))
    return crop.foreground * windows[view, top, left].mean().item() + (1 - crop.foreground) * anywhere
