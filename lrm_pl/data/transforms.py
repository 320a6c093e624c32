"""From a sample to what a step sees: view choice, canonical cameras, resize and crop, background. Pure functions.

Randomness comes from one generator a sample, seeded by (seed, epoch, key): never from a process's own state, so a
sample looks the same whichever rank or worker makes it, and again after a resume.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.data.batch import Item, Views, WholeViews
from lrm_pl.data.schema import Sample, SampleError, decode_image
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import canonicalize, resize_and_crop
from lrm_pl.kernels.views import resized_window


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """How target views are resized and cropped in training (LRM, section 4.2: [128, 384] and 128).

    Attributes:
        low: Smallest side that a view is resized to.
        high: Largest side.
        size: Side of the random window that is supervised.
        foreground: Probability that a window is centered on a pixel of the object, as far as the image's edge
            allows, instead of anywhere (TripoSR, section 3.2: "crops covering foreground").
    """

    low: int = 128
    high: int = 384
    size: int = 128
    foreground: float = 0.0

    def __post_init__(self) -> None:
        """Check the order of the sizes."""
        if not 0 < self.size <= self.low <= self.high:
            raise InputError(expected="0 < size <= low <= high", found=self)
        if not 0 <= self.foreground <= 1:
            raise InputError(expected="a crop.foreground in [0, 1]", found=self.foreground)


@dataclasses.dataclass(frozen=True)
class CropStage:
    """Sizes of the target windows from some step on: progressive resolution (MeshLRM, section 3.3).

    Attributes:
        from_step: First optimizer step.
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
            raise InputError(expected="crop_stages that begin at ascending steps from 1 on", found=starts)
        if self.camera_noise < 0:
            raise InputError(expected="a camera_noise of 0 or more", found=self.camera_noise)

    @property
    def crops(self) -> tuple[CropConfig, ...]:
        """The sizes of all steps."""
        return self.crop, *(stage.crop for stage in self.stages)

    def crop_at(self, step: int) -> CropConfig:
        """Return the sizes of an optimizer step."""
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
        raise SampleError(
            expected=f"at least {count} training views", found=available, remedy="render more VIEWS"
        )
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
) -> Item:
    """Make the item of one object: input views whole and over white, all chosen views resized, cropped, recolored.

    Args:
        sample: The object, with at least the chosen views read.
        views: Chosen views, the input views first; these are targets too.
        inputs: Number of input views.
        augmentation: What is random.
        step: Optimizer step that it is for.
        rng: The sample's generator.
    """
    crop = augmentation.crop_at(step)
    c2w, fxfycxcy = _cameras(sample, views)
    side = int(rng.integers(crop.low, crop.high + 1))
    whole: list[npt.NDArray[np.uint8]] = []
    windows, intrinsics = [], []
    for view, camera in zip(views, fxfycxcy, strict=True):
        # One view is done before the next is decoded: their bytes then lie in the same place, which is in the cache.
        rgba = decode_image(sample.info.id, sample.views[view])
        top, left = _place_window(rgba, side, crop, rng)
        windows.append(resized_window(rgba, side, top, left, crop.size))
        intrinsics.append(resize_and_crop(camera, (side, side), (top, left, crop.size, crop.size)))
        if len(whole) < inputs:
            whole.append(rgba)
    background = torch.from_numpy(rng.random((len(views), 3), dtype=np.float32))
    jitter = torch.from_numpy(rng.random((len(views), crop.size, crop.size), dtype=np.float32))
    target = _views(torch.stack(windows), background, c2w, torch.stack(intrinsics), jitter)
    # Copies: what the network is told may be made noisy.
    told = _whole(sample, whole, c2w[:inputs].clone(), fxfycxcy[:inputs].clone())
    if augmentation.camera_noise:
        told.c2w[:, :3] += _noise(rng, augmentation.camera_noise, (inputs, 3, 4))
        told.fxfycxcy += _noise(rng, augmentation.camera_noise, (inputs, 4))
    return Item((sample.info.id,), told, target, torch.ones(()))


def evaluation_item(sample: Sample, inputs: int, target_views: Sequence[int]) -> Item:
    """Make an item without randomness: whole images over white, of which the first ``inputs`` views go in."""
    views = [*range(inputs), *target_views]
    rgba = [decode_image(sample.info.id, sample.views[view]) for view in views]
    c2w, fxfycxcy = _cameras(sample, views)
    target = _whole(sample, rgba[inputs:], c2w[inputs:], fxfycxcy[inputs:])
    return Item(
        (sample.info.id,),
        _whole(sample, rgba[:inputs], c2w[:inputs], fxfycxcy[:inputs]),
        target,
        torch.ones(()),
    )


def _cameras(sample: Sample, views: Sequence[int]) -> tuple[Float[Tensor, "V 4 4"], Float[Tensor, "V 4"]]:
    c2w = torch.from_numpy(sample.c2w[list(views)])
    return canonicalize(c2w), torch.from_numpy(sample.fxfycxcy[list(views)])


def _whole(
    sample: Sample, rgba: Sequence[npt.NDArray[np.uint8]], c2w: Tensor, fxfycxcy: Tensor
) -> WholeViews:
    """Put views together as they are."""
    sizes = sorted({view.shape[:2] for view in rgba})
    if len(sizes) > 1:
        raise SampleError(subject=f"sample {sample.info.id!r}", expected="views of one size", found=sizes)
    pixels = rgba[0][None] if len(rgba) == 1 else np.stack(rgba) if rgba else np.empty((0, 1, 1, 4), np.uint8)
    return WholeViews(torch.from_numpy(pixels), c2w, fxfycxcy)


def _place_window(
    rgba: npt.NDArray[np.uint8], side: int, crop: CropConfig, rng: np.random.Generator
) -> tuple[int, int]:
    """Draw the top left corner of a window of the resized view."""
    spare = side - crop.size
    if crop.foreground and rng.random() < crop.foreground:
        pixels = (resized_window(rgba, side, 0, 0, side)[3] > 0.5).nonzero()
        if len(pixels):
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
