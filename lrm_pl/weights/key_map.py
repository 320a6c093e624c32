"""Reading of weight files of other projects, and strict mapping of keys.

Every key in a file must be mapped or known to be unused. ``openlrm.py`` and ``triposr.py`` define mappings.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lrm_pl.errors import counted
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.lrm import LRM
from lrm_pl.weights.resolve import WeightsError

#: Allowed dtypes of source tensors.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: Maps regular expressions for target keys to templates of source keys. The first match applies. The tensors of several
#: source keys are concatenated along the first dimension.
Rules = dict[str, tuple[str, ...]]

#: Rules for files that have the key names of the network.
SAME_KEYS: Rules = {r"(.+)": (r"\1",)}


class ConversionError(WeightsError):
    """Exception that is raised if weights do not match the architecture."""


def read_tensor_file(path: Path, name: str) -> Mapping[Any, Any]:
    """Read tensors by name from a file, without executing code that the file contains.

    Args:
        path: Path of a .safetensors file, or of a .pth, .pt, .ckpt or .bin file saved with ``torch.save``.
        name: Name of the weights, for messages.

    Raises:
        WeightsError: The file has an unsupported suffix, is damaged, does not contain a mapping, or contains code.
    """
    if path.suffix not in (".safetensors", ".pth", ".pt", ".ckpt", ".bin"):
        raise WeightsError(
            subject=name,
            expected=f"{path} to end in .safetensors, .pth, .pt, .ckpt or .bin",
            found=f"{path.suffix!r}",
            remedy="use the weight file as published",
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the readers raise many types of errors for damaged files
        # Only the first sentence is used because the other sentences recommend running the code in the file.
        reason = re.split(r"(?<=[.!?]) |\n", str(error).strip(), maxsplit=1)[0]
        raise WeightsError(
            subject=name,
            expected=f"a mapping of names to tensors in {path}",
            found=f"an unreadable file ({type(error).__name__}: {reason})",
            remedy="download the file again; code in the file was not executed",
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(
            subject=name,
            expected=f"a mapping of names to tensors in {path}",
            found=type(content).__name__,
            remedy="save the state_dict() of the network",
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
    """Record of how one or more source keys were mapped.

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
    """Map a source state dict to the keys of this project, one key at a time.

    Missing, unexpected and invalid tensors are collected, and ``map`` raises an error that lists all of them.

    Args:
        source: Name of the source project or file, for messages.
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
                    expected="floating-point tensors in dense layout",
                    found=f"the key {key!r} with a value of type {type(value).__name__}",
                    remedy="save the state_dict() of the network",
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
                found=", ".join(map(repr, list(self.state)[:5])) or "no keys",
                remedy="check that the file contains weights of this network that are not inside another dict",
            )
        shape = tuple(self.state[key].shape)
        if len(shape) != dimensions:
            raise ConversionError(
                subject=self.source, expected=f"{key} with {dimensions} dimensions", found=shape
            )
        return shape

    def count(self, pattern: str, step: int = 1) -> int:
        """Count consecutive layers.

        Args:
            pattern: Format string that returns a key of a layer when formatted with the index of the layer.
            step: Difference between the indices of consecutive layers. The first index is 0.
        """
        return next(n for n in itertools.count() if pattern.format(step * n) not in self.state)

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

    def ignore(self, prefix: str, reason: str) -> None:
        """Mark the keys with a given prefix as unused."""
        for key in [key for key in self._unused if key.startswith(prefix)]:
            del self._unused[key]
            self.report.append(KeyRecord((key,), "", tuple(self.state[key].shape), reason))

    def map(self, network: nn.Module, rules: Rules) -> None:
        """Set all tensors of a network that have not been set yet, and check that all source keys are used.

        Args:
            network: The network, which may be on the meta device.
            rules: Rules for the keys of the network.

        Raises:
            ConversionError: A tensor is missing, unexpected or invalid. The message lists all problems.
        """
        for target, parameter in network.state_dict().items():
            if target not in self.weights:
                self._apply_rule(target, tuple(parameter.shape), rules)
        self._problems += [f"{key} {tuple(self.state[key].shape)} is unexpected" for key in self._unused]
        if self._problems:
            raise ConversionError(
                subject=self.source,
                expected="exactly the weights of this network",
                found="\n  ".join([f"{counted(len(self._problems), 'difference')}:", *self._problems]),
                remedy="use a weight file of this network",
            )

    def _apply_rule(self, target: str, shape: tuple[int, ...], rules: Rules) -> None:
        matches = ((re.fullmatch(pattern, target), templates) for pattern, templates in rules.items())
        sources = next(tuple(map(match.expand, templates)) for match, templates in matches if match)
        parts = [self.take(key, (shape[0] // len(sources), *shape[1:])) for key in sources]
        if len(sources) == 1:
            self.put(target, parts[0], sources, "")
        else:
            self.put(target, torch.cat(parts) if self.is_valid else parts[0], sources, "concatenated")


def meta_network(lrm: Mapping[str, Any]) -> LRM:
    """Build a network on the meta device.

    Args:
        lrm: Arguments of ``LRM``, with dictionaries of arguments for the encoder and the decoder.

    Raises:
        InputError: The arguments are inconsistent.
    """
    with torch.device("meta"):
        parts = {"encoder": ImageEncoder(**lrm["encoder"]), "decoder": NeRFDecoder(**lrm["decoder"])}
        return LRM(**{**lrm, **parts})


def decoder_rules(source: str, layers: int) -> Rules:
    """Return the rules for a NeRF MLP, which is a sequence of alternating linear layers and activations.

    Args:
        source: Prefix of the source keys.
        layers: Number of linear layers.
    """
    return {rf"decoder\.layers\.{n}\.(.+)": (rf"{source}.{2 * n}.\1",) for n in range(layers)}


def square_side(number: float, expected: str, source: str) -> int:
    """Return the side length of a square of patches or tokens.

    Args:
        number: Number of patches or tokens.
        expected: Description of the expected tensor, for messages.
        source: Name of the source project, for messages.

    Raises:
        ConversionError: The number is not a positive perfect square.
    """
    side = round(max(0, number) ** 0.5)
    if side < 1 or side * side != number:
        raise ConversionError(subject=source, expected=expected, found=number)
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
            remedy=f"set {option}",
        )
    return heads
