"""Trivial baselines that predict a white image, the mean training image, or the input view."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.data.schema import SampleError
from lrm_pl.evaluation.dataset import EvaluationDataset
from lrm_pl.evaluation.objects import Baseline, decode_over_white
from lrm_pl.evaluation.protocols import Protocol

#: Number of training objects, and views of each object, from which the mean image is computed.
_OBJECTS, _VIEWS = 64, (0, 1, 2, 3)


def trivial_baselines(objects: EvaluationDataset) -> dict[str, Baseline]:
    """Return the baselines by name. The mean training image is omitted if there are no training objects."""
    made = {
        "white image": Baseline(
            lambda image, targets: targets.new_ones(()).expand_as(targets), uses_input=False
        ),
        "input view repeated": Baseline(_repeat, uses_input=True),
    }
    if (mean := _mean_image(objects)) is not None:
        made["mean training image"] = Baseline(
            lambda image, targets: _repeat(mean, targets), uses_input=False
        )
    return made


def _mean_image(objects: EvaluationDataset) -> Float[Tensor, "3 h w"] | None:
    """Return the mean of views of training objects in the size of the first view, or None if there are no views."""
    training = objects.samples_of("train")
    count = min(_OBJECTS, len(training))
    protocol = Protocol("mean image", "", inputs=_VIEWS, targets=_VIEWS)

    def views() -> Iterator[Tensor]:
        for number in range(count):
            _, location = training[number * len(training) // count]
            with contextlib.suppress(SampleError):
                yield decode_over_white(objects.read(location, protocol), _VIEWS)

    total, images = sum_images(views())
    return total / images if images else None


def sum_images(batches: Iterable[Float[Tensor, "n 3 h w"]]) -> tuple[Tensor, int]:
    """Sum images after resizing them to the size of the first image.

    Returns:
        Sum of shape (3, h, w), or a scalar 0 if there are no images, and the number of images.
    """
    total, count = torch.zeros(()), 0
    for images in batches:
        total = total + (resize_images(images, total) if total.ndim else images).sum(dim=0)
        count += len(images)
    return total, count


def resize_images(
    images: Float[Tensor, "*n 3 h w"], like: Float[Tensor, "*m 3 H W"]
) -> Float[Tensor, "*n 3 H W"]:
    """Resize images to the size of ``like`` by antialiased bilinear interpolation."""
    size = like.shape[-2:]
    if images.shape[-2:] == size:
        return images
    flat = F.interpolate(images.reshape(-1, *images.shape[-3:]), size, mode="bilinear", antialias=True)
    return flat.view(*images.shape[:-2], *size)


def _repeat(image: Float[Tensor, "3 h w"], targets: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
    return resize_images(image[None].to(targets.device), targets).expand_as(targets)
