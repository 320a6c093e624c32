"""Folder format of trained models.

    config.yaml          ``model`` section of the config, which describes the network and the renderer
    model.safetensors    weights
    input.yaml           framing of the input images (``InputFraming``)
    README.md            model card

``lrm export``, ``lrm convert`` and ``LRMPipeline.save_pretrained`` write model folders, and
``LRMPipeline.from_pretrained`` and ``lrm fit --weights.network`` read model folders. Reading a model folder does not
execute code, because the config contains no class names and the weights are in the safetensors format.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrm_pl.checkpoints.files import sync_folder
from lrm_pl.checkpoints.index import Checkpoint
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.errors import InputError
from lrm_pl.models.lrm import LRM
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.storage import is_local
from lrm_pl.weights.key_map import SAME_KEYS, ConversionError, KeyMapper

CONFIG_NAME = "config.yaml"
WEIGHTS_NAME = "model.safetensors"
FRAMING_NAME = "input.yaml"
CARD_NAME = "README.md"

#: Maximum number of lines of an error message about mismatched weights.
_MAX_LINES = 7


def write_model_folder(
    folder: Path,
    model: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    header: str,
    framing: InputFraming,
    card: str,
    step: int | None = None,
) -> None:
    """Write the files of a model folder and flush them to disk.

    Args:
        folder: Path of an existing folder.
        model: ``model`` section of a config, which must contain ``lrm`` and ``renderer``.
        weights: State dict of the network.
        header: Comment about the origin of the model, which is written on the first line of config.yaml.
        framing: Framing of the input images.
        card: Text of the model card.
        step: Number of optimizer steps of training, or None if unknown.
    """
    text = yaml.safe_dump({"model": dict(model)}, sort_keys=False)
    (folder / CONFIG_NAME).write_text(f"# {header}\n{text}")
    (folder / FRAMING_NAME).write_text(framing_yaml(framing))
    (folder / CARD_NAME).write_text(card)
    metadata = {"format": "pt"} | ({} if step is None else {"step": str(step)})
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / WEIGHTS_NAME, metadata=metadata)
    # safetensors creates files that only the owner can read.
    (folder / WEIGHTS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode)
    sync_folder(str(folder))


def read_step(folder: Path) -> int | None:
    """Return the number of optimizer steps after which the weights in a model folder were saved, or None if unknown."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        step = (file.metadata() or {}).get("step", "")
    return int(step) if step.isdecimal() else None


def framing_yaml(framing: InputFraming) -> str:
    """Return the content of ``input.yaml`` for a framing."""
    return yaml.safe_dump(dataclasses.asdict(framing), sort_keys=False)


def read_framing(folder: Path) -> InputFraming | None:
    """Read ``input.yaml`` in a model folder or run folder, or return None if the file does not exist.

    Raises:
        InputError: The file is invalid.
    """
    path = folder / FRAMING_NAME
    if not path.is_file():
        return None
    return InputFraming.of_record(_read_yaml(path, "a mapping of names to numbers"), str(path))


def hash_weights(network: nn.Module) -> str:
    """Return the SHA-256 of the names, shapes and float32 values of a network's weights, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_model_section(config: Path) -> dict[str, Any]:
    """Read the ``model`` section of a config file.

    Raises:
        InputError: The file cannot be read, or does not contain a ``model.lrm`` section.
    """
    section = _read_yaml(config, "the config of a run").get("model")
    if not isinstance(section, dict) or "lrm" not in section:
        raise InputError(
            subject=config,
            expected="a model.lrm section",
            found="none",
            remedy="use the config.yaml of a run",
        )
    return section


def _read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """Read a YAML file that contains a mapping.

    Args:
        path: Path of the file.
        expected: Description of the expected content in error messages.

    Raises:
        InputError: The file cannot be read or does not contain a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(subject=path, expected=expected, found=error) from error
    if not isinstance(content, dict):
        raise InputError(subject=path, expected=expected, found=type(content).__name__)
    return content


def find_config(checkpoint: Checkpoint, config: Path | None) -> Path:
    """Return the path of the config of the run that a checkpoint belongs to.

    Args:
        checkpoint: Checkpoint of the run.
        config: Path of the config. If None, it is config.yaml in the parent of the folder that contains the checkpoint.

    Raises:
        InputError: The file does not exist, or ``config`` is None and the checkpoint is remote.
    """
    if config is None and is_local(checkpoint.path):
        config = Path(checkpoint.path).absolute().parents[1] / CONFIG_NAME
    if config is None or not config.is_file():
        raise InputError(
            expected=f"the config of the run that saved {checkpoint.path}",
            found=f"no file {config}" if config else "a remote checkpoint",
            remedy=f"pass --config RUN/{CONFIG_NAME}",
        )
    return config


def build_network(model: Mapping[str, Any]) -> tuple[LRM, Renderer]:
    """Build the network, with random weights, and the renderer.

    Args:
        model: ``model`` section of a config.

    Raises:
        InputError: The section contains unknown or invalid settings.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LRM, "lrm")
    parser.add_class_arguments(Renderer, "renderer")
    try:
        parsed = parser.parse_object({part: model.get(part, {}) for part in ("lrm", "renderer")})
    except ArgumentError as error:
        raise InputError(
            expected="a model section that is valid in this version of lrm_pl", found=error
        ) from error
    built = parser.instantiate(parsed)
    return cast(LRM, built["lrm"]), cast(Renderer, built["renderer"])


def load_weights(network: LRM, folder: Path) -> None:
    """Load ``model.safetensors`` in a model folder into a network. The dtype of the network does not change.

    Raises:
        InputError: The file does not exist, is damaged, or does not match the network exactly.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise InputError(
            expected=f"the weights of a network at {path}",
            found="none",
            remedy="create a model folder with `lrm export RUN OUT` or `lrm convert`",
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(
            subject=path,
            expected="a safetensors file",
            found=f"a damaged file ({error})",
            remedy="download or export the file again",
        ) from error
    keys = KeyMapper(str(path), weights)
    try:
        keys.map(network, SAME_KEYS)
    except ConversionError as error:
        raise InputError(
            subject=path,
            expected="the weights of this network",
            found="\n".join(str(error.found).splitlines()[:_MAX_LINES]),
            remedy=f"pass the config of these weights with -c {folder / CONFIG_NAME}",
        ) from error
    network.load_state_dict(keys.weights, strict=True)
