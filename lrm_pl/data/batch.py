"""What a training step receives: views of B objects, as dataclasses of tensors.

They are not frozen: Lightning rebuilds dataclasses field by field when it casts a batch, and refuses frozen ones.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.errors import InputError


@dataclasses.dataclass
class Views:
    """V views of each object (without the leading B while still one item).

    Attributes:
        images: (B, V, 3, H, W) sRGB in [0, 1], over ``background``.
        alpha: (B, V, H, W) coverage by the object.
        background: (B, V, 3) colour behind the object.
        c2w: (B, V, 4, 4) canonical poses, OpenCV.
        fxfycxcy: (B, V, 4) normalised intrinsics.
        jitter: (B, V, H, W) in [0, 1), place of each ray's samples in their bins; None for the middle.
    """

    images: Float[Tensor, "*B V 3 H W"]
    alpha: Float[Tensor, "*B V H W"]
    background: Float[Tensor, "*B V 3"]
    c2w: Float[Tensor, "*B V 4 4"]
    fxfycxcy: Float[Tensor, "*B V 4"]
    jitter: Float[Tensor, "*B V H W"] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.images.shape[-2], self.images.shape[-1]

    def to(self, device: torch.device | str) -> "Views":
        """Move all tensors."""
        jitter = None if self.jitter is None else self.jitter.to(device)
        images, alpha, background = self.images.to(device), self.alpha.to(device), self.background.to(device)
        return Views(images, alpha, background, self.c2w.to(device), self.fxfycxcy.to(device), jitter)


@dataclasses.dataclass
class Batch:
    """B objects: the input views of each, and the views to be rendered.

    Attributes:
        ids: Keys of the samples.
        input: The views that the network is given (usually V = 1), whole, over white.
        target: Views that the loss or the metrics see.
        weight: (B) 1, or 0 for an object that only stands in, so that all ranks have equally many.
        faults: What was wrong with the samples in whose place each object stands; () for most.
    """

    ids: tuple[str, ...]
    input: Views
    target: Views
    weight: Float[Tensor, "*B"]
    faults: tuple[tuple[str, ...], ...] = ()

    def to(self, device: torch.device | str) -> "Batch":
        """Move all tensors (Lightning calls this)."""
        input_views, target = self.input.to(device), self.target.to(device)
        return Batch(self.ids, input_views, target, self.weight.to(device), self.faults)


def collate(items: Sequence[Batch]) -> Batch:
    """Stack items (without a leading B) to a batch.

    Raises:
        InputError: Items whose images differ in size.
    """
    for part in ("input", "target"):
        shapes = {tuple(getattr(item, part).images.shape) for item in items}
        if len(shapes) > 1:
            raise InputError(
                f"expected {part} views of one shape in a batch, found {sorted(shapes)}; render all objects with the "
                "same RES and VIEWS, or use a batch size of 1"
            )
    return Batch(
        tuple(key for item in items for key in item.ids),
        _stack([item.input for item in items]),
        _stack([item.target for item in items]),
        torch.stack([item.weight for item in items]),
        tuple(met for item in items for met in item.faults),
    )


def _stack(views: Sequence[Views]) -> Views:
    jitters = [view.jitter for view in views if view.jitter is not None]
    return Views(
        torch.stack([view.images for view in views]),
        torch.stack([view.alpha for view in views]),
        torch.stack([view.background for view in views]),
        torch.stack([view.c2w for view in views]),
        torch.stack([view.fxfycxcy for view in views]),
        torch.stack(jitters) if jitters else None,
    )
