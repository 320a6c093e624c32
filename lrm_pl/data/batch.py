"""What a training step receives: views of B objects, as dataclasses of tensors.

They are not frozen: Lightning rebuilds dataclasses field by field when it casts a batch, and refuses frozen ones.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from lrm_pl.errors import InputError
from lrm_pl.kernels.views import over_white

Ids = tuple[str, ...]

#: What was wrong with the samples in whose place each object stands.
Faults = tuple[tuple[str, ...], ...]


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

    ids: Ids
    input: Views
    target: Views
    weight: Float[Tensor, "*B"]
    faults: Faults = ()

    def to(self, device: torch.device | str) -> "Batch":
        """Move all tensors (Lightning calls this)."""
        input_views, target = self.input.to(device), self.target.to(device)
        return Batch(self.ids, input_views, target, self.weight.to(device), self.faults)


@dataclasses.dataclass
class WholeViews:
    """Views as they lie in a shard, but decoded: bytes are a quarter of what ``Views`` has to say of them.

    Attributes:
        rgba: (*B, V, H, W, 4) sRGB, straight alpha.
        c2w: (*B, V, 4, 4) canonical poses, OpenCV.
        fxfycxcy: (*B, V, 4) normalised intrinsics.
    """

    rgba: UInt8[Tensor, "*B V H W 4"]
    c2w: Float[Tensor, "*B V 4 4"]
    fxfycxcy: Float[Tensor, "*B V 4"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.rgba.shape[-3], self.rgba.shape[-2]

    def over_white(self) -> Views:
        """Lay them over white."""
        images, alpha = over_white(self.rgba)
        return Views(images, alpha, torch.ones(*self.rgba.shape[:-3], 3), self.c2w, self.fxfycxcy)


@dataclasses.dataclass
class Item:
    """One object of a batch; no field has a leading B.

    Attributes:
        ids: The sample's key.
        input: The views that the network is given.
        target: Views that the loss or the metrics see.
        weight: () 1, or 0 for an object that only stands in.
        faults: What was wrong with the samples in whose place it stands.
    """

    ids: Ids
    input: WholeViews
    target: Views | WholeViews
    weight: Float[Tensor, ""]
    faults: Faults = ()


class Parcel:
    """A batch on its way from a worker: all its numbers in one piece of shared memory. It arrives as a ``Batch``.

    A tensor alone costs a file, a message and two mappings; and white is laid behind whole views on arrival.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        columns = list(zip(*map(_tensors, items), strict=True))
        self.layout = [(column[0].dtype, (len(items), *column[0].shape)) for column in columns]
        ends = list(itertools.accumulate(_bytes(*place) for place in self.layout))
        # As PyTorch's own collate does: stacked where the other process reads it.
        storage = torch.UntypedStorage._new_shared(ends[-1])  # type: ignore[no-untyped-call]
        self.flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        for place, column in zip(_cut(self.flat, self.layout), columns, strict=True):
            torch.stack(column, out=place)
        self.ids, self.faults, self.whole = *_names(items), isinstance(items[0].target, WholeViews)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the memory, and open it there."""
        return _open, (self.flat, self.layout, self.whole, self.ids, self.faults)


def collate(items: Sequence[Item]) -> Batch | Parcel:
    """Stack items to a batch; in a worker process to one that is sent well.

    Raises:
        InputError: Items whose images differ in size.
    """
    for part in ("input", "target"):
        sizes = {getattr(item, part).size for item in items}
        counts = {getattr(item, part).c2w.shape[0] for item in items}
        if len(sizes) > 1 or len(counts) > 1:
            which = ", ".join(
                f"{getattr(item, part).size} of {item.ids[0]!r} ({getattr(item, part).c2w.shape[0]} views)"
                for item in items
            )
            raise InputError(
                f"expected {part} views of one shape in a batch, found {which}; render all objects with the same RES "
                "and VIEWS, leave out those that differ, or use a batch size of 1"
            )
    if get_worker_info() is not None:
        return Parcel(items)
    tensors = [torch.stack(column) for column in zip(*map(_tensors, items), strict=True)]
    return _batch(tensors, isinstance(items[0].target, WholeViews), *_names(items))


def _tensors(item: Item) -> list[Tensor]:
    """List the numbers of an item; bytes last, so that all lie on multiples of their size."""
    target, whole = item.target, item.input
    if isinstance(target, WholeViews):
        numbers, pixels = [target.c2w, target.fxfycxcy], [target.rgba]
    else:
        numbers, pixels = [target.images, target.alpha, target.background, target.c2w, target.fxfycxcy], []
        numbers += [] if target.jitter is None else [target.jitter]
    return [item.weight, whole.c2w, whole.fxfycxcy, *numbers, *pixels, whole.rgba]


def _batch(tensors: Sequence[Tensor], whole: bool, ids: Ids, faults: Faults) -> Batch:
    """Undo ``_tensors``."""
    weight, c2w, fxfycxcy, *target, rgba = tensors
    views = WholeViews(target[2], target[0], target[1]).over_white() if whole else Views(*target)
    return Batch(ids, WholeViews(rgba, c2w, fxfycxcy).over_white(), views, weight, faults)


def _names(items: Sequence[Item]) -> tuple[Ids, Faults]:
    return tuple(key for item in items for key in item.ids), tuple(
        met for item in items for met in item.faults
    )


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def _cut(flat: Tensor, layout: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> list[Tensor]:
    """Lay tensors out one after the other in flat bytes."""
    ends = list(itertools.accumulate(_bytes(*place) for place in layout))
    starts = [0, *ends[:-1]]
    return [
        flat[start:end].view(dtype).view(shape)
        for start, end, (dtype, shape) in zip(starts, ends, layout, strict=True)
    ]


def _open(
    flat: Tensor, layout: Sequence[tuple[torch.dtype, tuple[int, ...]]], whole: bool, ids: Ids, faults: Faults
) -> Batch:
    return _batch(_cut(flat, layout), whole, ids, faults)
