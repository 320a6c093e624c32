"""Image metrics PSNR, SSIM and LPIPS of sRGB images in [0, 1], computed in float32 without TF32.

SSIM is computed with torchmetrics (Gaussian window of 11 pixels, sigma 1.5, data range 1, borders excluded), and LPIPS
is computed with the lpips package. PSNR is reported both as the mean over images and from the pooled squared error.
"""

from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import without_tf32
from lrm_pl.losses.perceptual import PerceptualLoss, require_image_pairs

#: Maximum distance of values from [0, 1], to which they are clamped. The decoder exceeds the range by up to 0.001.
RANGE_TOLERANCE: Final = 0.01

#: Side of the window of SSIM in pixels, which is the minimum side of an image.
SSIM_WINDOW: Final = 11


class NotFiniteError(InputError):
    """Error raised if an image contains NaN or infinity."""


class ImageScores(NamedTuple):
    """Metrics of a set of images.

    This is a named tuple because torchmetrics cannot copy frozen dataclasses that ``compute`` returns.

    Attributes:
        psnr: Mean PSNR over images in dB, which is infinite if any image equals its target.
        psnr_pooled: PSNR of the squared error averaged over all pixels of all images, in dB. It is infinite if all
            images equal their targets.
        ssim: Mean SSIM over images.
        lpips: Mean LPIPS over images, or None if there is no LPIPS network.
        images: Number of images.
    """

    psnr: float
    psnr_pooled: float
    ssim: float
    lpips: float | None
    images: int


def psnr(prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Compute the PSNR of each image in dB, which is infinite if an image equals its target."""
    prediction, target = _checked(prediction, target)
    return _decibel((prediction - target).square().mean((1, 2, 3)))


def ssim(prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """Compute the structural similarity of each image, which is 1 if an image equals its target.

    Raises:
        ValueError: The images are smaller than the window of SSIM, have values outside [0, 1], or differ in shape.
    """
    return _ssim(*_checked(prediction, target))


def _ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the SSIM of validated images."""
    if min(prediction.shape[-2:]) < SSIM_WINDOW:
        raise InputError(
            subject="SSIM",
            expected=f"images of at least {SSIM_WINDOW} x {SSIM_WINDOW} pixels",
            found=tuple(prediction.shape[-2:]),
            remedy="evaluate full images instead of crops",
        )
    with torch.autocast(prediction.device.type, enabled=False), without_tf32():
        values = structural_similarity_index_measure(prediction, target, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)  # with return_full_image, it would be a tuple
    return values


class ImageMetrics(Metric):
    """Image metrics that are accumulated over images, batches and ranks, with equal weight for every image.

    Args:
        perceptual: LPIPS network. If None, LPIPS is omitted.
        options: Keyword arguments passed to ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    lowest: Tensor
    highest: Tensor
    sums: Tensor
    values: Tensor
    images: Tensor

    def __init__(self, perceptual: PerceptualLoss | None = None, **options: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(**options)
        self.perceptual = perceptual
        # Sums of squared error, PSNR, SSIM and LPIPS, in float64 because float32 sums over many images lose precision.
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("values", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # The ranges of predictions and targets are read only in ``compute`` because reading synchronizes with the GPU.
        self.add_state("lowest", torch.full((2,), torch.inf), dist_reduce_fx="min")
        self.add_state("highest", torch.full((2,), -torch.inf), dist_reduce_fx="max")

    def update(self, prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]) -> None:
        """Add a batch of images. ``compute`` checks that their values are in [0, 1]."""
        require_image_pairs(prediction, target)
        lowest, highest = _ranges(prediction, target)
        self.lowest = torch.minimum(self.lowest, lowest)
        self.highest = torch.maximum(self.highest, highest)
        prediction, target = _clamped(prediction), _clamped(target)
        squared = (prediction - target).square()
        self.values += squared.numel()
        self.images += squared.shape[0]
        scores = [squared, _decibel(squared.mean((1, 2, 3))), _ssim(prediction, target)]
        if self.perceptual is not None:
            with torch.autocast(prediction.device.type, enabled=False), without_tf32():
                scores.append(self.perceptual.to(prediction.device)(prediction, target))
        self.sums[: len(scores)] += torch.stack([score.double().sum() for score in scores])

    def compute(self) -> ImageScores:
        """Compute the metrics of all images of all ranks.

        Raises:
            NotFiniteError: A predicted image contains NaN or infinity.
            ValueError: There are no images, or an image has values outside [0, 1].
        """
        images = int(self.images)
        if images == 0:
            raise InputError(
                subject="image metrics",
                expected="at least one image",
                found="none",
                remedy="call update before compute, and check that the evaluation set is not empty",
            )
        if not (torch.isfinite(self.lowest[0]) and torch.isfinite(self.highest[0])):
            raise NotFiniteError(
                subject="image metrics",
                expected="finite predictions",
                found="NaN or infinity, which indicates that the network has diverged",
                remedy="use an earlier checkpoint, or lower the learning rate",
            )
        _check_ranges(self.lowest, self.highest)
        pooled = float(_decibel(self.sums[0] / self.values))
        psnr, ssim, lpips = (self.sums[1:] / images).tolist()
        return ImageScores(psnr, pooled, ssim, None if self.perceptual is None else lpips, images)


def _decibel(squared_error: Tensor) -> Tensor:
    return -10 * torch.log10(squared_error)


def _checked(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Validate shapes and ranges, and return predictions and targets in float32, clamped to [0, 1]."""
    require_image_pairs(prediction, target)
    _check_ranges(*_ranges(prediction, target))
    return _clamped(prediction), _clamped(target)


def _ranges(prediction: Tensor, target: Tensor) -> tuple[Float[Tensor, "2"], Float[Tensor, "2"]]:
    """Return the minima and maxima of prediction and target on the device of the images. NaN is propagated."""
    (a, b), (c, d) = (images.detach().float().aminmax() for images in (prediction, target))
    return torch.stack([a, c]), torch.stack([b, d])


def _check_ranges(lowest: Float[Tensor, "2"], highest: Float[Tensor, "2"]) -> None:
    ranges = torch.stack([lowest, highest], dim=-1).tolist()  # synchronizes with the GPU
    for name, (low, high) in zip(("prediction", "target"), ranges, strict=True):
        if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):
            raise ValueError(
                f"image metrics: expected a {name} with values in [0, 1], but found [{low:g}, {high:g}]. "
                "Divide 8-bit images by 255, invert the normalization of network inputs, and check for NaN"
            )


def _clamped(images: Tensor) -> Tensor:
    return images.float().clamp(0, 1)
