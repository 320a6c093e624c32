"""From a sample to what a step sees: view choice, canonical cameras, resize and crop, background. Pure functions.

Randomness comes from one generator a sample, seeded by (seed, epoch, key): never from a process's own state, so a
sample looks the same whichever rank or worker makes it, and again after a resume.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.data.batch import Batch, Views
from lrm_pl.data.schema import Sample, SampleError, decode_image
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import canonicalise, resize_and_crop


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """How target views are resized and cropped in training (LRM, section 4.2: [128, 384] and 128).

    Attributes:
        low: Smallest side that a view is resized to.
        high: Largest side.
        size: Side of the random window that is supervised.
    """

    low: int = 128
    high: int = 384
    size: int = 128

    def __post_init__(self) -> None:
        """Check the order of the sizes."""
        if not 0 < self.size <= self.low <= self.high:
            raise InputError(f"expected 0 < size <= low <= high, found {self}")


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Make the one generator that all randomness of a sample in an epoch comes from."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{key}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def choose_views(
    rng: np.random.Generator, available: int, count: int, input_views: int | None = None
) -> list[int]:
    """Draw ``count`` different views out of the first ``available``; the first drawn is the input view.

    Args:
        rng: The sample's generator.
        available: Training views of the object.
        count: Views wanted.
        input_views: The input view is one of the first so many; None means any.

    Raises:
        SampleError: Too few views.
    """
    if available < count:
        raise SampleError(f"expected at least {count} training views, found {available}; render more VIEWS")
    first = int(rng.integers(min(input_views or available, available)))
    others = rng.permutation([view for view in range(available) if view != first])
    return [first, *(int(view) for view in others[: count - 1])]


def training_item(sample: Sample, views: Sequence[int], crop: CropConfig, rng: np.random.Generator) -> Batch:
    """Make the item of one object: input view whole and over white, all chosen views resized, cropped, recoloured.

    Args:
        sample: The object, with at least the chosen views read.
        views: Chosen views, the input view first; it is a target too.
        crop: Sizes.
        rng: The sample's generator.
    """
    rgba = [_premultiplied(sample, view) for view in views]
    c2w, fxfycxcy = _cameras(sample, views)
    side = int(rng.integers(crop.low, crop.high + 1))
    windows, intrinsics = [], []
    for image, camera in zip(rgba, fxfycxcy, strict=True):
        top, left = (int(x) for x in rng.integers(0, side - crop.size + 1, size=2))
        resized = resize(image, side)
        windows.append(resized[:, top : top + crop.size, left : left + crop.size])
        intrinsics.append(resize_and_crop(camera, (side, side), (top, left, crop.size, crop.size)))
    background = torch.from_numpy(rng.random((len(views), 3), dtype=np.float32))
    jitter = torch.from_numpy(rng.random((len(views), crop.size, crop.size), dtype=np.float32))
    target = _views(torch.stack(windows), background, c2w, torch.stack(intrinsics), jitter)
    return Batch((sample.info.id,), _input(rgba[0], c2w, fxfycxcy), target, torch.ones(()))


def evaluation_item(sample: Sample, input_view: int, target_views: Sequence[int]) -> Batch:
    """Make an item without randomness: whole images over white."""
    views = [input_view, *target_views]
    rgba = [_premultiplied(sample, view) for view in views]
    c2w, fxfycxcy = _cameras(sample, views)
    white = torch.ones(len(target_views), 3)
    target = _views(torch.stack(rgba[1:]), white, c2w[1:], fxfycxcy[1:], None)
    return Batch((sample.info.id,), _input(rgba[0], c2w, fxfycxcy), target, torch.ones(()))


def resize(image: Float[Tensor, "C H W"], side: int) -> Float[Tensor, "C side side"]:
    """Resize with pixel centres at + 0.5 and antialiasing, so that intrinsics divided by the size stay true."""
    if image.shape[-2:] == (side, side):
        return image
    resized = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)


def _premultiplied(sample: Sample, view: int) -> Float[Tensor, "4 H W"]:
    rgba = torch.from_numpy(decode_image(sample.info.id, sample.views[view])).permute(2, 0, 1).float() / 255
    return torch.cat([rgba[:3] * rgba[3:], rgba[3:]])  # resizing straight alpha would bleed hidden colours


def _cameras(sample: Sample, views: Sequence[int]) -> tuple[Float[Tensor, "V 4 4"], Float[Tensor, "V 4"]]:
    c2w = torch.from_numpy(sample.c2w[list(views)])
    return canonicalise(c2w), torch.from_numpy(sample.fxfycxcy[list(views)])


def _input(rgba: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> Views:
    return _views(rgba[None], torch.ones(1, 3), c2w[:1], fxfycxcy[:1], None)


def _views(rgba: Tensor, background: Tensor, c2w: Tensor, fxfycxcy: Tensor, jitter: Tensor | None) -> Views:
    alpha = rgba[:, 3]
    images = rgba[:, :3] + (1 - alpha)[:, None] * background[:, :, None, None]
    return Views(images, alpha, background, c2w, fxfycxcy, jitter)
