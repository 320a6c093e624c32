"""Creation of items from samples, with view selection, canonical cameras, random crops and backgrounds.

All random numbers of a sample come from one generator, which is seeded with the seed of the run, the epoch and the key
of the sample. The item is therefore identical on all ranks and workers, and does not change when a run is resumed.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrm_pl.data.batch import Item, Views, WholeViews
from lrm_pl.data.schema import Sample, SampleError, SampleInfo, decode_image
from lrm_pl.errors import InputError
from lrm_pl.geometry.cameras import canonicalize, resize_and_crop
from lrm_pl.kernels.views import resized_window


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """Settings for random resizing and cropping of target views in training (LRM, section 4.2).

    Attributes:
        low: Minimum side of a resized view in pixels.
        high: Maximum side of a resized view in pixels.
        size: Side of the target window in pixels.
        foreground: Probability that the window is centered on a pixel of the object, or as close to it as the image
            borders allow (TripoSR, section 3.2). Otherwise, the position is drawn uniformly.
    """

    low: int = 128
    high: int = 384
    size: int = 128
    foreground: float = 0.0

    def __post_init__(self) -> None:
        """Validate the sizes and the probability."""
        if not 0 < self.size <= self.low <= self.high:
            raise InputError(expected="crop settings with 0 < size <= low <= high", found=self)
        if not 0 <= self.foreground <= 1:
            raise InputError(expected="a value of crop.foreground in [0, 1]", found=self.foreground)


@dataclasses.dataclass(frozen=True)
class CropStage:
    """Crop settings that are used starting at a given optimizer step (progressive resolution; MeshLRM, section 3.3).

    Attributes:
        from_step: First optimizer step in which the settings are used.
        crop: The crop settings.
    """

    from_step: int
    crop: CropConfig


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Settings for random crops and camera noise of training items.

    Attributes:
        crop: Crop settings at the start of training.
        stages: Crop settings of later steps, in ascending order of steps.
        camera_noise: Half-width of the uniform noise added to each element of the poses and intrinsics of the input
            views (InstantMesh uses 0.02). Target cameras are not changed.
    """

    crop: CropConfig
    stages: tuple[CropStage, ...] = ()
    camera_noise: float = 0.0

    def __post_init__(self) -> None:
        """Validate the camera noise and the order of the stages."""
        starts = [stage.from_step for stage in self.stages]
        if starts != sorted(set(starts)) or any(start < 1 for start in starts):
            raise InputError(
                expected="crop_stages that begin at strictly ascending steps of at least 1", found=starts
            )
        if self.camera_noise < 0:
            raise InputError(expected="a camera_noise of 0 or more", found=self.camera_noise)

    @property
    def crops(self) -> tuple[CropConfig, ...]:
        """Crop settings of all stages."""
        return self.crop, *(stage.crop for stage in self.stages)

    def crop_at(self, step: int) -> CropConfig:
        """Return the crop settings of an optimizer step."""
        return self.crops[sum(stage.from_step <= step for stage in self.stages)]


def sample_rng(seed: int, epoch: int, key: str, repeat: int = 0) -> np.random.Generator:
    """Return the random generator of a sample.

    Args:
        seed: Seed of the run.
        epoch: Index of the epoch.
        key: Key of the sample.
        repeat: Index of the repetition of the sample in the epoch.
    """
    again = f"/{repeat}" if repeat else ""
    digest = hashlib.sha256(f"{seed}/{epoch}/{key}{again}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def choose_views(
    rng: np.random.Generator, available: int, count: int, input_pool: int | None = None
) -> list[int]:
    """Draw training views of an object without replacement.

    Args:
        rng: Random generator of the sample.
        available: Number of training views of the object.
        count: Number of views to draw.
        input_pool: Number of leading views of the object from which the first returned view is drawn. If None, it is
            drawn from all training views.

    Returns:
        Indices of the views.

    Raises:
        SampleError: There are fewer than ``count`` training views.
    """
    if available < count:
        raise SampleError(
            f"at least {count} training views", available, "render more views with a larger value of VIEWS"
        )
    first = int(rng.integers(min(input_pool or available, available)))
    others = rng.permutation([view for view in range(available) if view != first])
    return [first, *(int(view) for view in others[: count - 1])]


@dataclasses.dataclass
class DecodedSample:
    """A decoded training sample before augmentation, as passed to the functions in ``data.stages``.

    Attributes:
        info: Metadata of the object.
        views: Indices of the selected views, starting with the input views.
        images: One (H, W, 4) uint8 sRGB image with straight alpha per selected view.
        c2w: (V, 4, 4) float32 camera-to-world poses of the selected views in the OpenCV convention.
        fxfycxcy: (V, 4) float32 normalized intrinsics of the selected views.
        step: Optimizer step in which the sample is used.
        rng: Random generator of the sample. For reproducible runs, use no other source of random numbers.
    """

    info: SampleInfo
    views: list[int]
    images: list[npt.NDArray[np.uint8]]
    c2w: npt.NDArray[np.float32]
    fxfycxcy: npt.NDArray[np.float32]
    step: int
    rng: np.random.Generator


def decode_views(sample: Sample, views: Sequence[int], step: int, rng: np.random.Generator) -> DecodedSample:
    """Decode selected views of a sample.

    Args:
        sample: The sample, which must contain the selected views.
        views: Indices of the selected views, starting with the input views.
        step: Optimizer step in which the sample is used.
        rng: Random generator of the sample.

    Raises:
        SampleError: A view cannot be decoded.
    """
    chosen = list(views)
    images = [decode_image(sample.info.id, sample.views[view]) for view in chosen]
    return DecodedSample(sample.info, chosen, images, sample.c2w[chosen], sample.fxfycxcy[chosen], step, rng)


def training_item(sample: DecodedSample, inputs: int, augmentation: Augmentation) -> Item:
    """Create a training item with input views at full size and a random window of each view as a target.

    Args:
        sample: The decoded views. The first ``inputs`` views are input views, and all views are target views.
        inputs: Number of input views.
        augmentation: Settings for random crops and camera noise.

    Raises:
        SampleError: The sizes of the input views differ.
    """
    crop, rng, count = augmentation.crop_at(sample.step), sample.rng, len(sample.images)
    c2w, fxfycxcy = canonicalize(torch.from_numpy(sample.c2w)), torch.from_numpy(sample.fxfycxcy)
    side = int(rng.integers(crop.low, crop.high + 1))
    corners = [_place_window(rgba, side, crop, rng) for rgba in sample.images]
    windows = torch.tensor([(*corner, crop.size, crop.size) for corner in corners], dtype=torch.float32)
    crops = [
        resized_window(rgba, side, *at, crop.size) for rgba, at in zip(sample.images, corners, strict=True)
    ]
    background = torch.from_numpy(rng.random((count, 3), dtype=np.float32))
    jitter = torch.from_numpy(rng.random((count, crop.size, crop.size), dtype=np.float32))
    pixels = torch.stack(crops)
    images = pixels[:, :3] + (1 - pixels[:, 3:]) * background[:, :, None, None]
    intrinsics = resize_and_crop(fxfycxcy, (side, side), windows)
    target = Views(images, pixels[:, 3], background, c2w, intrinsics, jitter)
    # The cameras are copied, because noise is added in place.
    views = _whole(sample.info.id, sample.images[:inputs], c2w[:inputs].clone(), fxfycxcy[:inputs].clone())
    if augmentation.camera_noise:
        views.c2w[:, :3] += _noise(rng, augmentation.camera_noise, (inputs, 3, 4))
        views.fxfycxcy += _noise(rng, augmentation.camera_noise, (inputs, 4))
    return Item((sample.info.id,), views, target, torch.ones(()))


def evaluation_item(sample: Sample, inputs: int, target_views: Sequence[int]) -> Item:
    """Create an evaluation item with input and target views at full size.

    Args:
        sample: The sample, which must contain the input and target views.
        inputs: Number of input views, which are the first views of the object.
        target_views: Indices of the target views.

    Raises:
        SampleError: A view cannot be decoded, or the sizes of the input or target views differ.
    """
    key, views = sample.info.id, [*range(inputs), *target_views]
    rgba = [decode_image(key, sample.views[view]) for view in views]
    c2w = canonicalize(torch.from_numpy(sample.c2w[views]))
    fxfycxcy = torch.from_numpy(sample.fxfycxcy[views])
    source = _whole(key, rgba[:inputs], c2w[:inputs], fxfycxcy[:inputs])
    return Item((key,), source, _whole(key, rgba[inputs:], c2w[inputs:], fxfycxcy[inputs:]), torch.ones(()))


def _whole(key: str, rgba: Sequence[npt.NDArray[np.uint8]], c2w: Tensor, fxfycxcy: Tensor) -> WholeViews:
    """Stack views of equal size."""
    sizes = sorted({view.shape[:2] for view in rgba})
    if len(sizes) > 1:
        raise SampleError(subject=f"sample {key!r}", expected="views of equal size", found=sizes)
    pixels = np.stack(rgba) if rgba else np.empty((0, 1, 1, 4), np.uint8)
    return WholeViews(torch.from_numpy(pixels), c2w, fxfycxcy)


def _place_window(
    rgba: npt.NDArray[np.uint8], side: int, crop: CropConfig, rng: np.random.Generator
) -> tuple[int, int]:
    """Return the row and column of the top-left pixel of a random window in the resized view."""
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
