"""Trivial baselines that predict a white image, the mean training image, or the input view."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.data.schema import SampleError
from lrm_pl.evaluation.dataset import EvaluationDataset
from lrm_pl.evaluation.objects import Baselines, decode_over_white, resize_images
from lrm_pl.evaluation.protocols import Protocol

#: Number of training objects, and views of each object, from which the mean image is computed.
_OBJECTS, _VIEWS = 64, (0, 1, 2, 3)


def trivial_baselines(objects: EvaluationDataset) -> Baselines:
    """Return the baselines by name. The mean training image is omitted if there are no training objects."""
    baselines: dict[str, Tensor | None] = {"white image": torch.ones(3, 1, 1), "input view repeated": None}
    training = objects.samples_of("train")
    count = min(_OBJECTS, len(training))
    protocol = Protocol("mean image", "", inputs=_VIEWS, targets=_VIEWS)

    def views() -> Iterator[Tensor]:
        for number in range(count):
            _, location = training[number * len(training) // count]
            with contextlib.suppress(SampleError):
                yield decode_over_white(objects.read(location, protocol), _VIEWS)

    total, images = sum_images(views())
    return baselines | ({"mean training image": total / images} if images else {})


def sum_images(batches: Iterable[Float[Tensor, "n 3 h w"]]) -> tuple[Tensor, int]:
    """Sum images after resizing them to the size of the first image.

    Returns:
        The sum and the number of images. The sum has shape (3, h, w), or is a scalar 0 if there are no images.
    """
    total, count = torch.zeros(()), 0
    for images in batches:
        total = total + (resize_images(images, total) if total.ndim else images).sum(dim=0)
        count += len(images)
    return total, count
