"""Batches: ``collate`` packs items into a ``PackedBatch``, which becomes a ``Batch`` on the device.

The dataclasses are not frozen because Lightning sets their fields when it casts or moves a batch.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import on_cuda
from lrm_pl.kernels.views import over_white

Ids = tuple[str, ...]

#: Per object, the error messages of the bad samples that it replaces.
Faults = tuple[tuple[str, ...], ...]

#: Dtype and shape of each tensor of a packed batch.
Layout = list[tuple[torch.dtype, tuple[int, ...]]]

#: Alignment of the tensors of a packed batch, bytes: suits vectorized loads of any dtype.
_ALIGNMENT = 64


@dataclasses.dataclass
class Views:
    """V views of each object; without the leading dimension B in an ``Item``.

    Attributes:
        images: (B, V, 3, H, W) sRGB in [0, 1], over ``background``.
        alpha: (B, V, H, W) coverage by the object.
        background: (B, V, 3) color behind the object.
        c2w: (B, V, 4, 4) canonical poses, OpenCV.
        fxfycxcy: (B, V, 4) normalized intrinsics.
        jitter: (B, V, H, W) in [0, 1), position of each ray's samples in their bins; None for the center.
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


@dataclasses.dataclass
class Batch:
    """B objects with their input and target views.

    Attributes:
        ids: Keys of the samples.
        input: Input views of the network (usually V = 1), whole, over white.
        target: Views for the loss or the metrics.
        weight: (B) 1, or 0 for a replacement that evens out the number of items over ranks.
        faults: Error messages of the bad samples that each object replaces; () for most.
    """

    ids: Ids
    input: Views
    target: Views
    weight: Float[Tensor, "*B"]
    faults: Faults = ()


@dataclasses.dataclass
class WholeViews:
    """Whole decoded views as bytes, a quarter of the size of ``Views``.

    Attributes:
        rgba: (*B, V, H, W, 4) sRGB, straight alpha.
        c2w: (*B, V, 4, 4) canonical poses, OpenCV.
        fxfycxcy: (*B, V, 4) normalized intrinsics.
    """

    rgba: UInt8[Tensor, "*B V H W 4"]
    c2w: Float[Tensor, "*B V 4 4"]
    fxfycxcy: Float[Tensor, "*B V 4"]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.rgba.shape[-3], self.rgba.shape[-2]

    def over_white(self) -> Views:
        """Composite the views over white, on their device."""
        images, alpha = over_white(self.rgba)
        background = torch.ones(*self.rgba.shape[:-3], 3, device=self.rgba.device)
        return Views(images, alpha, background, self.c2w, self.fxfycxcy)


@dataclasses.dataclass
class Item:
    """One object of a batch; fields have no leading dimension B.

    Attributes:
        ids: Key of the sample.
        input: Input views of the network.
        target: Views for the loss or the metrics.
        weight: () 1, or 0 for a replacement.
        faults: Error messages of the bad samples that it replaces.
    """

    ids: Ids
    input: WholeViews
    target: Views | WholeViews
    weight: Float[Tensor, ""]
    faults: Faults = ()


@dataclasses.dataclass
class PackedBatch:
    """A batch in one contiguous tensor: one shared-memory file, one pinning, one copy to the device.

    Attributes:
        flat: (N) bytes of all tensors.
        layout: Dtype and shape of each tensor, in the order of ``_tensors``.
        whole: Whether the targets are ``WholeViews``.
        ids: Keys of the samples.
        faults: As in ``Batch``.
    """

    flat: UInt8[Tensor, " N"]
    layout: Layout
    whole: bool
    ids: Ids
    faults: Faults

    def pin_memory(self) -> "PackedBatch":
        """Copy to pinned memory; a DataLoader with ``pin_memory=True`` calls this."""
        return dataclasses.replace(self, flat=self.flat.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device and composite whole views over white there; Lightning calls this.

        Copies to CUDA devices are asynchronous, so that they do not wait for queued kernels.
        """
        device = torch.device(device)
        flat = self.flat.to(device, non_blocking=on_cuda(device))
        weight, rgba, c2w, fxfycxcy, *target = _unpack(flat, self.layout)
        views = WholeViews(*target).over_white() if self.whole else Views(*target)
        return Batch(self.ids, WholeViews(rgba, c2w, fxfycxcy).over_white(), views, weight, self.faults)


def collate(items: Sequence[Item]) -> PackedBatch:
    """Stack items to a batch; in shared memory in a worker process.

    Raises:
        InputError: The items differ in the size or number of their views.
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
                expected=f"{part} views of one shape in a batch",
                found=which,
                remedy="render all objects with the same RES and VIEWS, or use a batch size of 1",
            )
    columns = list(zip(*map(_tensors, items), strict=True))
    layout = [(column[0].dtype, (len(items), *column[0].shape)) for column in columns]
    size = _offsets(layout)[-1]
    if get_worker_info() is None:
        flat = torch.empty(size, dtype=torch.uint8)
    else:  # as in PyTorch's default collate
        storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    for tensor, column in zip(_unpack(flat, layout), columns, strict=True):
        torch.stack(column, out=tensor)
    ids = tuple(key for item in items for key in item.ids)
    faults = tuple(met for item in items for met in item.faults)
    return PackedBatch(flat, layout, isinstance(items[0].target, WholeViews), ids, faults)


def _tensors(item: Item) -> list[Tensor]:
    """List the tensors of an item in the order of their fields."""
    views = (*vars(item.input).values(), *vars(item.target).values())
    return [item.weight, *(tensor for tensor in views if tensor is not None)]


def _offsets(layout: Layout) -> list[int]:
    """Return the byte offset of each tensor in a packed batch, and the total size."""
    sizes = (math.prod(shape) * dtype.itemsize for dtype, shape in layout)
    return [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]


def _unpack(flat: Tensor, layout: Layout) -> list[Tensor]:
    """Return the tensors of a packed batch as views of ``flat``."""
    return [
        flat[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for start, (dtype, shape) in zip(_offsets(layout), layout, strict=False)
    ]
