"""Reading of weight files of other projects, and strict mapping of keys.

Every key in a file must be mapped or known to be unused. The mappings are defined in ``openlrm.py`` and ``triposr.py``.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.weights.resolve import WeightsError

#: Allowed dtypes of source tensors.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ConversionError(InputError):
    """Exception that is raised if weights do not match the architecture."""


def read_tensor_file(path: Path, name: str) -> Mapping[Any, Any]:
    """Read tensors by name from a file, without executing code that the file contains.

    Args:
        path: Path of a .safetensors file, or of a .pth, .pt, .ckpt or .bin file that ``torch.save`` wrote.
        name: Name of the weights, for messages.

    Raises:
        WeightsError: The file is damaged, does not contain a mapping, or contains code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in (".pth", ".pt", ".ckpt", ".bin"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise WeightsError(
                subject=name,
                expected=f"{path} to end in .safetensors, .pth, .pt, .ckpt or .bin",
                found=f"{path.suffix!r}",
                remedy="give the weight file as published",
            )
    except (WeightsError, OSError):
        raise
    except Exception as error:  # the readers raise many types of errors for damaged files
        # Only the first sentence is used because the other sentences recommend running the code in the file.
        reason = re.split(r"(?<=[.!?]) |\n", str(error).strip(), maxsplit=1)[0]
        raise WeightsError(
            subject=name,
            expected=f"tensors by name in {path}",
            found=f"an unreadable file ({type(error).__name__}: {reason})",
            remedy="download the file again; no code in it was run",
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            subject=name,
            expected=f"tensors by name in {path}",
            found=type(content).__name__,
            remedy="save the network's state_dict()",
        )
    return content


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters that cannot be determined from tensor shapes.

    If an attribute is None, the value of the published models is used.

    Attributes:
        heads: Number of attention heads of the transformer. Published models have one head per 64 channels.
        encoder_heads: Number of attention heads of the encoder. Published models have one head per 64 channels.
        image_size: Side length of the input image of the encoder in pixels.
        samples_per_ray: Number of samples per ray, including importance samples.
    """

    heads: int | None = None
    encoder_heads: int | None = None
    image_size: int | None = None
    samples_per_ray: int | None = None


@dataclasses.dataclass(frozen=True)
class KeyRecord:
    """Mapping of one or several source keys.

    Attributes:
        sources: Source keys.
        target: Key in this project. Empty if the source keys are unused.
        shape: Shape of the resulting tensor, or of the source tensor if the key is unused.
        change: Description of the conversion, or the reason why the key is unused. Empty if the tensor is copied.
    """

    sources: tuple[str, ...]
    target: str
    shape: tuple[int, ...]
    change: str


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Converted weights.

    Attributes:
        model: Section ``model`` of a config, which describes the network and the renderer.
        weights: State dict of the network.
        report: Mappings of all source keys.
    """

    model: dict[str, Any]
    weights: dict[str, Tensor]
    report: list[KeyRecord]


class KeyMapper:
    """Mapping of a source state dict, key by key.

    Missing, unexpected and invalid tensors are collected, and ``finish`` raises an error that lists all of them.

    Args:
        source: Name of the source project, for messages.
        state: Source state dict.

    Raises:
        ConversionError: A value is not a dense floating-point tensor.
    """

    def __init__(self, source: str, state: Mapping[Any, Any]) -> None:
        self.source, self.state = source, dict(state)
        self.weights: dict[str, Tensor] = {}
        self.report: list[KeyRecord] = []
        self._problems: list[str] = []
        self._unused = dict.fromkeys(self.state)
        for key, value in self.state.items():
            if not (isinstance(key, str) and isinstance(value, Tensor) and value.dtype in _DTYPES) or (
                value.layout != torch.strided
            ):
                raise ConversionError(
                    subject=source,
                    expected="floating-point tensors by name",
                    found=f"{key!r}: {type(value).__name__}",
                    remedy="give the network's plain state dict",
                )

    def shape_of(self, key: str, dimensions: int) -> tuple[int, ...]:
        """Return the shape of a required tensor.

        Args:
            key: Key of the tensor.
            dimensions: Expected number of dimensions.

        Raises:
            ConversionError: The tensor is missing, or has a different number of dimensions.
        """
        if key not in self.state:
            raise ConversionError(
                subject=self.source,
                expected=f"the key {key!r}",
                found=_first_keys(list(self.state)),
                remedy="check that the file is of this network, and that the weights are not inside another dict",
            )
        shape = tuple(self.state[key].shape)
        if len(shape) != dimensions:
            raise ConversionError(
                subject=self.source, expected=f"{key} of {dimensions} dimensions", found=shape
            )
        return shape

    def count(self, pattern: str, step: int = 1) -> int:
        """Count consecutive layers.

        Args:
            pattern: Format string that returns a key of a layer when formatted with the index of the layer.
            step: Difference between the indices of consecutive layers. The first index is 0.
        """
        number = 0
        while pattern.format(step * number) in self.state:
            number += 1
        return number

    @property
    def is_valid(self) -> bool:
        """Whether no problem has been found so far. If False, memory must not be allocated for sizes from the file."""
        return not self._problems

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return a source tensor in float32. If it is missing or invalid, record the problem and return zeros."""
        self._unused.pop(key, None)
        tensor = self.state.get(key)
        if tensor is None:
            self._problems.append(f"{key} is missing")
        elif tuple(tensor.shape) != shape:
            self._problems.append(f"{key} has shape {tuple(tensor.shape)} instead of {shape}")
        elif not tensor.is_meta and not torch.isfinite(tensor).all():
            self._problems.append(f"{key} has non-finite values")
        else:
            return tensor.float()
        return torch.zeros(()).expand(shape)  # allocates no memory, because the shape may be from the file

    def put(self, target: str, value: Tensor, sources: tuple[str, ...], change: str) -> None:
        """Set a tensor of the result.

        Args:
            target: Key in this project.
            value: The tensor.
            sources: Source keys.
            change: Description of the conversion. Empty if the tensor is copied.
        """
        self.weights[target] = value.contiguous() if self.is_valid else value
        self.report.append(KeyRecord(sources, target, tuple(value.shape), change))

    def copy(self, source: str, target: str, shape: tuple[int, ...]) -> None:
        """Copy a tensor of the given shape."""
        self.put(target, self.take(source, shape), (source,), "")

    def linear(self, source: str, target: str, rows: int, columns: int, *, bias: bool = True) -> None:
        """Copy the weight and, unless ``bias`` is False, the bias of a linear layer."""
        self.copy(f"{source}.weight", f"{target}.weight", (rows, columns))
        if bias:
            self.copy(f"{source}.bias", f"{target}.bias", (rows,))

    def decoder(self, source: str, channels: int, width: int, layers: int) -> None:
        """Copy the NeRF MLP, which is a sequence of alternating linear layers and activations.

        Args:
            source: Prefix of the source keys.
            channels: Number of channels of each plane.
            width: Number of channels of the hidden layers.
            layers: Number of linear layers.
        """
        sizes = [3 * channels, *[width] * (layers - 1), 4]
        for number in range(layers):
            self.linear(
                f"{source}.{2 * number}", f"decoder.layers.{number}", sizes[number + 1], sizes[number]
            )

    def norm(self, source: str, target: str, size: int) -> None:
        """Copy the weight and the bias of a normalization layer."""
        self.copy(f"{source}.weight", f"{target}.weight", (size,))
        self.copy(f"{source}.bias", f"{target}.bias", (size,))

    def concatenate(self, sources: tuple[str, ...], target: str, shape: tuple[int, ...]) -> None:
        """Concatenate tensors of the same shape along the first dimension."""
        parts = [self.take(key, shape) for key in sources]
        value = torch.cat(parts) if self.is_valid else parts[0].expand(shape)
        self.put(target, value, sources, "concatenated")

    def ignore(self, key: str, reason: str) -> None:
        """Mark a key as unused if it exists."""
        if key in self._unused:
            del self._unused[key]
            self.report.append(KeyRecord((key,), "", tuple(self.state[key].shape), reason))

    def finish(self) -> None:
        """Check that all required tensors were found and all source keys were used.

        Raises:
            ConversionError: A tensor is missing, unexpected or invalid. The message lists all problems.
        """
        problems = self._problems + [
            f"{key} {tuple(self.state[key].shape)} is unexpected" for key in self._unused
        ]
        if problems:
            lines = "\n  ".join(problems)
            raise ConversionError(
                f"{self.source}: the file does not contain exactly the weights of this network; {len(problems)} "
                f"differences:\n  {lines}\nNothing was written. Give the weights of this network."
            )


def patch_sides(positions: int, image_size: int, patch: int, source: str) -> tuple[int, int]:
    """Return the number of patches per side of the stored position embeddings and of the image.

    Args:
        positions: Number of position embeddings, including the position embedding of the class token.
        image_size: Side length of the image in pixels.
        patch: Side length of a patch in pixels.
        source: Name of the source project, for messages.

    Raises:
        ConversionError: The embeddings do not form a square, or the patch size does not divide the image size.
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
    """Return the number of tokens per side of a plane.

    Args:
        tokens: Number of tokens of all three planes.
        source: Name of the source project, for messages.

    Raises:
        ConversionError: The number of tokens is not three times a square number.
    """
    side = round((tokens / 3) ** 0.5)
    if 3 * side * side != tokens:
        raise ConversionError(subject=source, expected="3 s s triplane tokens", found=tokens)
    return side


def default_heads(width: int, heads: int | None, option: str, source: str) -> int:
    """Return the number of attention heads.

    Args:
        width: Number of channels.
        heads: Number of heads. If None, there is one head per 64 channels, as in the published models.
        option: Name of the command-line option that sets the number of heads, for messages.
        source: Name of the source project, for messages.

    Raises:
        ConversionError: The width is not divisible by the number of heads.
    """
    heads = heads or width // 64
    if heads < 1 or width % heads:
        raise ConversionError(
            subject=source,
            expected=f"a number of heads that divides the width {width}",
            found=heads,
            remedy=f"give {option}",
        )
    return heads


def _first_keys(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "") or "none"
