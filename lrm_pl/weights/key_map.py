"""Turning somebody else's weights into ours: every key is accounted for, or nothing is written.

``convert_openlrm.py`` and ``convert_triposr.py`` say which of their keys becomes which of ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrm_pl.errors import InputError

#: What weights may be stored in.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ConversionError(InputError):
    """The weights are not of the architecture that they were said to be of."""


@dataclasses.dataclass(frozen=True)
class UnseenNumbers:
    """What tensors do not show. None: what the published models have.

    Attributes:
        heads: Attention heads a block of the transformer (published: 64 channels each).
        encoder_heads: Attention heads a block of the encoder (likewise).
        image_size: Side of the image that the encoder sees.
        samples_per_ray: Samples a ray, importance samples among them.
    """

    heads: int | None = None
    encoder_heads: int | None = None
    image_size: int | None = None
    samples_per_ray: int | None = None


@dataclasses.dataclass(frozen=True)
class KeyRecord:
    """What became of one or several of their keys.

    Attributes:
        theirs: Their keys.
        ours: Our key; empty where they are not needed.
        shape: Of our tensor.
        how: What was done, empty for a copy.
    """

    theirs: tuple[str, ...]
    ours: str
    shape: tuple[int, ...]
    how: str


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Converted weights.

    Attributes:
        model: The model section of a config: the network, and the renderer that it was trained with.
        weights: The network's state dict.
        report: What became of each of their keys.
    """

    model: dict[str, Any]
    weights: dict[str, Tensor]
    report: list[KeyRecord]


class KeyMapper:
    """Takes their tensors one by one, and knows at the end which are left.

    Args:
        source: Whose weights these are, for messages.
        state: Their state dict.

    Raises:
        ConversionError: Something in it is no tensor of floats.
    """

    def __init__(self, source: str, state: Mapping[Any, Any]) -> None:
        self.source, self.state = source, dict(state)
        self.weights: dict[str, Tensor] = {}
        self.report: list[KeyRecord] = []
        self._wrong: list[str] = []
        self._left = dict.fromkeys(self.state)
        for key, value in self.state.items():
            if not (isinstance(key, str) and isinstance(value, Tensor) and value.dtype in _DTYPES) or (
                value.layout != torch.strided
            ):
                raise ConversionError(
                    subject=source,
                    expected="tensors of floats by name",
                    found=f"{key!r}: {type(value).__name__}",
                    remedy="give the network's plain state dict",
                )

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        """Read sizes off a tensor that must be there.

        Raises:
            ConversionError: It is not, or has another number of dimensions.
        """
        if key not in self.state:
            raise ConversionError(
                subject=self.source,
                expected=f"the key {key!r}",
                found=_some(list(self.state)),
                remedy="is this another network, or are the weights inside another dict of the file?",
            )
        shape = tuple(self.state[key].shape)
        if len(shape) != dimensions:
            raise ConversionError(
                subject=self.source, expected=f"{key} of {dimensions} dimensions", found=shape
            )
        return shape

    def count(self, pattern: str, step: int = 1) -> int:
        """Count the layers whose keys are ``pattern`` with 0, step, 2 step ... in it."""
        number = 0
        while pattern.format(step * number) in self.state:
            number += 1
        return number

    def has(self, key: str) -> bool:
        """Say whether a key is there."""
        return key in self.state

    @property
    def sound(self) -> bool:
        """Whether nothing was wrong so far; if something was, sizes are not to be trusted with memory."""
        return not self._wrong

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Take one of their tensors; a missing or misshapen one is remembered, and zeros stand in for it."""
        self._left.pop(key, None)
        tensor = self.state.get(key)
        if tensor is None:
            self._wrong.append(f"{key} is missing")
        elif tuple(tensor.shape) != shape:
            self._wrong.append(f"{key} has shape {tuple(tensor.shape)} instead of {shape}")
        elif not tensor.is_meta and not torch.isfinite(tensor).all():
            self._wrong.append(f"{key} has numbers that are not finite")
        else:
            return tensor.float()
        return torch.zeros(()).expand(shape)  # a size out of a file: no memory is taken for it

    def put(self, ours: str, value: Tensor, theirs: tuple[str, ...], how: str) -> None:
        """Set one of our tensors."""
        self.weights[ours] = value.contiguous() if self.sound else value
        self.report.append(KeyRecord(theirs, ours, tuple(value.shape), how))

    def copy(self, theirs: str, ours: str, shape: tuple[int, ...]) -> None:
        """Take a tensor as it is."""
        self.put(ours, self.take(theirs, shape), (theirs,), "")

    def linear(self, theirs: str, ours: str, rows: int, columns: int, *, bias: bool = True) -> None:
        """Take a linear layer as it is."""
        self.copy(f"{theirs}.weight", f"{ours}.weight", (rows, columns))
        if bias:
            self.copy(f"{theirs}.bias", f"{ours}.bias", (rows,))

    def decoder(self, theirs: str, channels: int, width: int, layers: int) -> None:
        """Take the NeRF MLP: linear layers at every second place of a sequence, activations between them."""
        sizes = [3 * channels, *[width] * (layers - 1), 4]
        for number in range(layers):
            self.linear(
                f"{theirs}.{2 * number}", f"decoder.layers.{number}", sizes[number + 1], sizes[number]
            )

    def norm(self, theirs: str, ours: str, size: int) -> None:
        """Take weight and bias of a norm."""
        self.copy(f"{theirs}.weight", f"{ours}.weight", (size,))
        self.copy(f"{theirs}.bias", f"{ours}.bias", (size,))

    def stacked(self, theirs: tuple[str, ...], ours: str, shape: tuple[int, ...]) -> None:
        """Put tensors of one shape below each other."""
        parts = [self.take(key, shape) for key in theirs]
        together = torch.cat(parts) if self.sound else parts[0].expand(shape)
        self.put(ours, together, theirs, "put together")

    def leave_out(self, key: str, why: str) -> None:
        """Pass over a key that this network does not need, if it is there."""
        if key in self._left:
            del self._left[key]
            self.report.append(KeyRecord((key,), "", tuple(self.state[key].shape), why))

    def finish(self) -> None:
        """Refuse the weights unless every key was found and every one used.

        Raises:
            ConversionError: With all of the differences.
        """
        wrong = self._wrong + [f"{key} {tuple(self.state[key].shape)} is a stranger" for key in self._left]
        if wrong:
            raise ConversionError(
                f"{self.source}: expected the weights of this network and nothing else, but found {len(wrong)} "
                "differences:\n  "
                + "\n  ".join(wrong)
                + "\nNothing was written; give the weights of this network."
            )


def patch_sides(positions: int, image_size: int, patch: int, source: str) -> tuple[int, int]:
    """Return how many patches a side position embeddings are stored for, and how many the image has.

    Args:
        positions: Number of position embeddings, that of the class token among them.
        image_size: Side of the image.
        patch: Side of a patch.
        source: Whose weights these are.

    Raises:
        ConversionError: The embeddings are no square, or patches do not divide the image.
    """
    stored = round(max(0, positions - 1) ** 0.5)
    if stored < 1 or stored * stored != positions - 1:
        raise ConversionError(subject=source, expected="1 + n n position embeddings", found=positions)
    if image_size < patch or image_size % patch:
        raise ConversionError(
            subject=source,
            expected=f"an image size that is a multiple of {patch}",
            found=image_size,
            remedy="give --image-size",
        )
    return stored, image_size // patch


def plane_side(tokens: int, source: str) -> int:
    """Return the side s of a plane from the number of tokens 3 s s.

    Raises:
        ConversionError: It is no such number.
    """
    side = round((tokens / 3) ** 0.5)
    if 3 * side * side != tokens:
        raise ConversionError(subject=source, expected="3 s s triplane tokens", found=tokens)
    return side


def default_heads(width: int, given: int | None, option: str, source: str) -> int:
    """Return the number of heads: what is given, or 64 channels each as all published models have.

    Raises:
        ConversionError: It does not divide the width.
    """
    heads = given or width // 64
    if heads < 1 or width % heads:
        raise ConversionError(
            subject=source,
            expected=f"a number of heads that divides the width {width}",
            found=heads,
            remedy=f"give {option}",
        )
    return heads


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") or "none"
