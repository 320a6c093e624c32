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
        foreground: Probability that a window is centred on a pixel of the object, as far as the picture's edge
            allows, instead of anywhere (TripoSR, section 3.2: "crops covering foreground").
    """

    low: int = 128
    high: int = 384
    size: int = 128
    foreground: float = 0.0

    def __post_init__(self) -> None:
        """Check the order of the sizes."""
        if not 0 < self.size <= self.low <= self.high:
            raise InputError(f"expected 0 < size <= low <= high, found {self}")
        if not 0 <= self.foreground <= 1:
            raise InputError(f"expected a crop.foreground in [0, 1], found {self.foreground}")


@dataclasses.dataclass(frozen=True)
class CropStage:
    """Sizes of the target windows from some step on: progressive resolution (MeshLRM, section 3.3).

    Attributes:
        from_step: First optimiser step.
        crop: Sizes.
    """

    from_step: int
    crop: CropConfig


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is random about a training item besides the choice of views.

    Attributes:
        crop: Sizes of the target windows.
        stages: Sizes from later steps on, in ascending order.
        camera_noise: Every number of the pose and of the intrinsics that the network is told is moved by up to this
            much, evenly (InstantMesh: 0.02); the views themselves keep their true cameras.
    """

    crop: CropConfig
    stages: tuple[CropStage, ...] = ()
    camera_noise: float = 0.0

    def __post_init__(self) -> None:
        """Check the order of the stages."""
        starts = [stage.from_step for stage in self.stages]
        if starts != sorted(set(starts)) or any(start < 1 for start in starts):
            raise InputError(f"expected crop_stages that begin at ascending steps from 1 on, found {starts}")
        if self.camera_noise < 0:
            raise InputError(f"expected a camera_noise of 0 or more, found {self.camera_noise}")

    def crop_at(self, step: int) -> CropConfig:
        """Return the sizes of an optimiser step."""
        begun = [stage.crop for stage in self.stages if stage.from_step <= step]
        return begun[-1] if begun else self.crop


def sample_rng(seed: int, epoch: int, key: str, repeat: int = 0) -> np.random.Generator:
    """Make the one generator that all randomness of a sample's appearance in an epoch comes from."""
    again = f"/{repeat}" if repeat else ""
    digest = hashlib.sha256(f"{seed}/{epoch}/{key}{again}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def choose_views(
    rng: np.random.Generator, available: int, count: int, input_pool: int | None = None
) -> list[int]:
    """Draw ``count`` different views out of the first ``available``; the first drawn are the input views.

    Args:
        rng: The sample's generator.
        available: Training views of the object.
        count: Views wanted.
        input_pool: The first view drawn is one of the first so many; None means any.

    Raises:
        SampleError: Too few views.
    """
    if available < count:
        raise SampleError(f"expected at least {count} training views, found {available}; render more VIEWS")
    first = int(rng.integers(min(input_pool or available, available)))
    others = rng.permutation([view for view in range(available) if view != first])
    return [first, *(int(view) for view in others[: count - 1])]


def training_item(
    sample: Sample,
    views: Sequence[int],
    inputs: int,
    augmentation: Augmentation,
    step: int,
    rng: np.random.Generator,
) -> Batch:
    """Make the item of one object: input views whole and over white, all chosen views resized, cropped, recoloured.

    Args:
        sample: The object, with at least the chosen views read.
        views: Chosen views, the input views first; these are targets too.
        inputs: Number of input views.
        augmentation: What is random.
        step: Optimiser step that it is for.
        rng: The sample's generator.
    """
    crop = augmentation.crop_at(step)
    rgba = [_premultiplied(sample, view) for view in views]
    c2w, fxfycxcy = _cameras(sample, views)
    side = int(rng.integers(crop.low, crop.high + 1))
    windows, intrinsics = [], []
    for image, camera in zip(rgba, fxfycxcy, strict=True):
        resized = resize(image, side)
        top, left = _window(resized[3], crop, rng)
        windows.append(resized[:, top : top + crop.size, left : left + crop.size])
        intrinsics.append(resize_and_crop(camera, (side, side), (top, left, crop.size, crop.size)))
    background = torch.from_numpy(rng.random((len(views), 3), dtype=np.float32))
    jitter = torch.from_numpy(rng.random((len(views), crop.size, crop.size), dtype=np.float32))
    target = _views(torch.stack(windows), background, c2w, torch.stack(intrinsics), jitter)
    told = _input(rgba[:inputs], c2w, fxfycxcy)
    if augmentation.camera_noise:
        told.c2w[:, :3] += _noise(rng, augmentation.camera_noise, (inputs, 3, 4))
        told.fxfycxcy += _noise(rng, augmentation.camera_noise, (inputs, 4))
    return Batch((sample.info.id,), told, target, torch.ones(()))


def evaluation_item(sample: Sample, inputs: int, target_views: Sequence[int]) -> Batch:
    """Make an item without randomness: whole images over white, of which the first ``inputs`` views go in."""
    views = [*range(inputs), *target_views]
    rgba = [_premultiplied(sample, view) for view in views]
    c2w, fxfycxcy = _cameras(sample, views)
    white = torch.ones(len(target_views), 3)
    target = _views(torch.stack(rgba[inputs:]), white, c2w[inputs:], fxfycxcy[inputs:], None)
    return Batch((sample.info.id,), _input(rgba[:inputs], c2w, fxfycxcy), target, torch.ones(()))


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


def _input(rgba: Sequence[Tensor], c2w: Tensor, fxfycxcy: Tensor) -> Views:
    count = len(rgba)
    # Copies: what the network is told may be made noisy.
    cameras = c2w[:count].clone(), fxfycxcy[:count].clone()
    return _views(torch.stack(list(rgba)), torch.ones(count, 3), *cameras, None)


def _window(alpha: Float[Tensor, "H W"], crop: CropConfig, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the top left corner of a window."""
    spare = alpha.shape[-1] - crop.size
    if crop.foreground and rng.random() < crop.foreground and (alpha > 0.5).any():
        pixels = (alpha > 0.5).nonzero()
        row, column = pixels[int(rng.integers(len(pixels)))].tolist()
        return min(max(row - crop.size // 2, 0), spare), min(max(column - crop.size // 2, 0), spare)
    top, left = (int(x) for x in rng.integers(0, spare + 1, size=2))
    return top, left


def _noise(rng: np.random.Generator, size: float, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.uniform(-size, size, shape).astype(np.float32))


def _views(rgba: Tensor, background: Tensor, c2w: Tensor, fxfycxcy: Tensor, jitter: Tensor | None) -> Views:
    alpha = rgba[:, 3]
    images = rgba[:, :3] + (1 - alpha)[:, None] * background[:, :, None, None]
    return Views(images, alpha, background, c2w, fxfycxcy, jitter)
