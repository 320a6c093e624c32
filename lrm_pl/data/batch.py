"""Items and batches of views.

``collate`` packs items into a ``PackedBatch``, and ``PackedBatch.to`` converts it to a ``Batch`` on a device. The
dataclasses are not frozen, because Lightning sets their fields when it casts or moves a batch.
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

#: Error messages of the bad samples that each object replaces.
Faults = tuple[tuple[str, ...], ...]

#: Dtype and shape of each tensor of a packed batch.
Layout = list[tuple[torch.dtype, tuple[int, ...]]]

#: Alignment of the tensors of a packed batch in bytes, which allows vectorized loads of any dtype.
_ALIGNMENT = 64


@dataclasses.dataclass
class Views:
    """Views of objects. In an ``Item``, the fields do not have the leading dimension B.

    Attributes:
        images: (B, V, 3, H, W) sRGB colors in [0, 1], composited over ``background``.
        alpha: (B, V, H, W) coverage of each pixel by the object in [0, 1].
        background: (B, V, 3) background color of each view in [0, 1].
        c2w: (B, V, 4, 4) canonical camera-to-world poses in the OpenCV convention.
        fxfycxcy: (B, V, 4) normalized intrinsics.
        jitter: (B, V, H, W) relative position in [0, 1) of the samples of each ray within their sampling bins. If None,
            samples are at the centers of the bins.
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
    """A batch of B objects with input and target views.

    Attributes:
        ids: Keys of the samples.
        input: Input views of the network at full size over a white background.
        target: Target views of the losses or metrics.
        weight: (B,) 1 for a sample, or 0 for a replacement that equalizes the number of items per rank.
        faults: Error messages of the bad samples that each object replaces.
    """

    ids: Ids
    input: Views
    target: Views
    weight: Float[Tensor, "*B"]
    faults: Faults = ()


@dataclasses.dataclass
class WholeViews:
    """Decoded views at full size with 8 bits per channel.

    Attributes:
        rgba: (*B, V, H, W, 4) sRGB colors with straight alpha.
        c2w: (*B, V, 4, 4) canonical camera-to-world poses in the OpenCV convention.
        fxfycxcy: (*B, V, 4) normalized intrinsics.
    """

    rgba: UInt8[Tensor, "*B V H W 4"]
    c2w: Float[Tensor, "*B V 4 4"]
    fxfycxcy: Float[Tensor, "*B V 4"]

    def over_white(self) -> Views:
        """Composite the views over a white background."""
        images, alpha = over_white(self.rgba)
        background = torch.ones(*self.rgba.shape[:-3], 3, device=self.rgba.device)
        return Views(images, alpha, background, self.c2w, self.fxfycxcy)


@dataclasses.dataclass
class Item:
    """One object of a batch. The fields do not have the leading dimension B.

    Attributes:
        ids: Key of the sample.
        input: Input views of the network.
        target: Target views of the losses or metrics.
        weight: Scalar tensor that is 1 for a sample, or 0 for a replacement.
        faults: Error messages of the bad samples that the object replaces.
    """

    ids: Ids
    input: WholeViews
    target: Views | WholeViews
    weight: Float[Tensor, ""]
    faults: Faults = ()


@dataclasses.dataclass
class PackedBatch:
    """A batch in one contiguous tensor, which needs only one shared-memory file and one copy to the device.

    Attributes:
        flat: (N,) bytes of all tensors.
        layout: Data type and shape of each tensor.
        whole: Whether the targets are ``WholeViews``.
        ids: Keys of the samples.
        faults: Error messages of the bad samples that each object replaces.
    """

    flat: UInt8[Tensor, " N"]
    layout: Layout
    whole: bool
    ids: Ids
    faults: Faults

    def pin_memory(self) -> "PackedBatch":
        """Copy the batch to pinned memory. A DataLoader with ``pin_memory=True`` calls this method."""
        return dataclasses.replace(self, flat=self.flat.pin_memory())

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to a device, and composite views at full size over white. Lightning calls this method.

        Copies to CUDA devices are asynchronous, so that the CPU does not wait for queued kernels.
        """
        device = torch.device(device)
        flat = self.flat.to(device, non_blocking=on_cuda(device))
        weight, rgba, c2w, fxfycxcy, *target = _unpack(flat, self.layout)
        views = WholeViews(*target).over_white() if self.whole else Views(*target)
        return Batch(self.ids, WholeViews(rgba, c2w, fxfycxcy).over_white(), views, weight, self.faults)


def collate(items: Sequence[Item]) -> PackedBatch:
    """Stack items into a batch. In a worker process, the batch is created in shared memory.

    Raises:
        InputError: The size or the number of views differs between items.
    """
    columns = list(zip(*map(_tensors, items), strict=True))
    for column in columns:
        if len({tensor.shape for tensor in column}) > 1:
            pairs = zip(column, items, strict=True)
            raise InputError(
                expected="views of equal shape in a batch",
                found=", ".join(f"{tuple(tensor.shape)} of {item.ids[0]!r}" for tensor, item in pairs),
                remedy="render all objects with the same values of RES and VIEWS, or use a batch size of 1",
            )
    layout = [(column[0].dtype, (len(items), *column[0].shape)) for column in columns]
    size = _offsets(layout)[-1]
    if get_worker_info() is None:
        flat = torch.empty(size, dtype=torch.uint8)
    else:  # same as in PyTorch's default collate function
        storage = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    for tensor, column in zip(_unpack(flat, layout), columns, strict=True):
        torch.stack(column, out=tensor)
    ids = tuple(key for item in items for key in item.ids)
    faults = tuple(met for item in items for met in item.faults)
    return PackedBatch(flat, layout, isinstance(items[0].target, WholeViews), ids, faults)


def _tensors(item: Item) -> list[Tensor]:
    """Return the tensors of an item in the order of the fields."""
    views = (*vars(item.input).values(), *vars(item.target).values())
    return [item.weight, *(tensor for tensor in views if tensor is not None)]


def _offsets(layout: Layout) -> list[int]:
    """Return the byte offsets of the tensors in a packed batch, followed by the total size."""
    sizes = (math.prod(shape) * dtype.itemsize for dtype, shape in layout)
    return [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]


def _unpack(flat: Tensor, layout: Layout) -> list[Tensor]:
    """Return the tensors of a packed batch as views of ``flat``."""
    return [
        flat[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for start, (dtype, shape) in zip(_offsets(layout), layout, strict=False)
    ]
