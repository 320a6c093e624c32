"""Trivial answers that a network must beat: those of someone who has seen nothing, or only the input."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.data.schema import SampleError
from lrm_pl.evaluation.dataset import EvaluationDataset
from lrm_pl.evaluation.objects import Baseline, over_white
from lrm_pl.evaluation.protocols import Protocol

#: Training objects, and views of each, that the mean image is of.
_OBJECTS, _VIEWS = 64, (0, 1, 2, 3)


def trivial_baselines(objects: EvaluationDataset) -> dict[str, Baseline]:
    """Make all of them; the mean training image where there are training objects."""
    made = {
        "white image": Baseline(
            lambda image, targets: targets.new_ones(()).expand_as(targets), uses_input=False
        ),
        "input view repeated": Baseline(_resized, uses_input=True),
    }
    if (mean := _mean_image(objects)) is not None:
        made["mean training image"] = Baseline(
            lambda image, targets: _resized(mean, targets), uses_input=False
        )
    return made


def _mean_image(objects: EvaluationDataset) -> Float[Tensor, "3 h w"] | None:
    """Average views of training objects, in the size of the first."""
    training = objects.samples_of("train")
    count = min(_OBJECTS, len(training))
    protocol = Protocol("mean image", "", inputs=_VIEWS, targets=_VIEWS)
    total, images = torch.zeros(()), 0
    for number in range(count):
        _, place = training[number * len(training) // count]
        try:
            views = over_white(objects.read(place, protocol), _VIEWS)
        except SampleError:
            continue  # of so many, one that cannot be read does not matter
        total = total + (views if not total.ndim else _resized_all(views, total)).sum(0)
        images += len(views)
    return total / images if images else None


def _resized(image: Float[Tensor, "3 h w"], targets: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 H W"]:
    return _resized_all(image[None].to(targets.device), targets[0]).expand_as(targets)


def _resized_all(images: Float[Tensor, "n 3 h w"], like: Float[Tensor, "3 H W"]) -> Float[Tensor, "n 3 H W"]:
    if images.shape[-2:] == like.shape[-2:]:
        return images
    return F.interpolate(images, like.shape[-2:], mode="bilinear", antialias=True)
