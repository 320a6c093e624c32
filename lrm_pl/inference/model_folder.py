"""The folder that a trained network is handed on in.

    config.yaml          how it is built
    model.safetensors    its weights
    input.yaml           what images it is used to (``InputFraming``)
    README.md            what it is, for people: the model card

``lrm export`` and ``lrm convert`` write it, ``lrm fit --weights.network`` starts from it, inference reads it. Nothing
in it is run: the config names no classes, the weights are numbers.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrm_pl.checkpoints.files import sync_folder
from lrm_pl.checkpoints.index import Checkpoint
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.data.manifest import new_folder
from lrm_pl.errors import InputError
from lrm_pl.models.lrm import LRM
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.storage import is_local

CONFIG_NAME, WEIGHTS_NAME, SETUP_NAME, CARD_NAME = (
    "config.yaml",
    "model.safetensors",
    "input.yaml",
    "README.md",
)


def write_pretrained(
    out: Path,
    model: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    header: str,
    setup: InputFraming,
    card: str,
    step: int | None = None,
) -> None:
    """Write a new folder; it appears when it is whole.

    Args:
        out: The folder, which must not exist.
        model: The model section of a config; its parts ``lrm`` and ``renderer`` are what is read again.
        weights: The network's state dict.
        header: A line that says where this comes from.
        setup: What images it is used to.
        card: The model card.
        step: Optimizer steps of the run that it comes from; None where that is not known.

    Raises:
        InputError: OUT is there.
    """
    with new_folder(out) as folder:
        fill_pretrained(folder, model, weights, header, setup, card, step)
        sync_folder(str(folder))


def fill_pretrained(
    folder: Path,
    model: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    header: str,
    setup: InputFraming,
    card: str,
    step: int | None = None,
) -> None:
    """Write the files of ``write_pretrained`` into a folder that is there."""
    text = yaml.safe_dump({"model": dict(model)}, sort_keys=False)
    (folder / CONFIG_NAME).write_text(f"# {header}\n{text}")
    (folder / SETUP_NAME).write_text(setup_text(setup))
    (folder / CARD_NAME).write_text(card)
    facts = {"format": "pt"} | ({} if step is None else {"step": str(step)})
    save_file(dict(weights), folder / WEIGHTS_NAME, metadata=facts)
    # safetensors lets nobody else read it; a folder is handed on
    (folder / WEIGHTS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode)


def read_step(folder: Path) -> int | None:
    """Read after how many optimizer steps the weights of a folder are; None where it does not say."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        step = (file.metadata() or {}).get("step", "")
    return int(step) if step.isdecimal() else None


def setup_text(setup: InputFraming) -> str:
    """Write an ``input.yaml``."""
    return yaml.safe_dump(dataclasses.asdict(setup), sort_keys=False)


def read_setup(folder: Path) -> InputFraming | None:
    """Read what images a network is used to; None where its folder does not say.

    Raises:
        InputError: The file is none.
    """
    path = folder / SETUP_NAME
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(subject=path, expected="numbers with names", found=error) from error
    if not isinstance(content, dict):
        raise InputError(subject=path, expected="numbers with names", found=type(content).__name__)
    return InputFraming.of_record(content, str(path))


def weights_hash(network: nn.Module) -> str:
    """Hash a network's weights: sha256 over names, shapes and float32 values, in order of name."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def read_model_section(config: Path) -> dict[str, Any]:
    """Read the model section of a config file.

    Raises:
        InputError: It is no config of a run, or of a folder like this.
    """
    try:
        content = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(subject=config, expected="the config of a run", found=error) from error
    section = content.get("model") if isinstance(content, dict) else None
    if not isinstance(section, dict) or "lrm" not in section:
        raise InputError(
            subject=config,
            expected="a section model.lrm",
            found="none",
            remedy="name the config.yaml of a run",
        )
    return section


def find_config(checkpoint: Checkpoint, given: Path | None) -> Path:
    """Find RUN/config.yaml of RUN/checkpoints/step-....

    Raises:
        InputError: There is none.
    """
    path = given
    if path is None and is_local(checkpoint.path):
        path = Path(checkpoint.path).absolute().parents[1] / CONFIG_NAME
    if path is None or not path.is_file():
        raise InputError(
            expected=f"the config of the run of {checkpoint.path}",
            found=f"none at {path or 'its place'}",
            remedy=f"name it: --config RUN/{CONFIG_NAME}",
        )
    return path


def build_network(model: Mapping[str, Any]) -> tuple[LRM, Renderer]:
    """Build the network, with random weights, and the renderer that a model section describes.

    Raises:
        InputError: It names what there is not, or numbers that do not go together.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LRM, "lrm")
    parser.add_class_arguments(Renderer, "renderer")
    try:
        parsed = parser.parse_object({part: model.get(part, {}) for part in ("lrm", "renderer")})
    except ArgumentError as error:
        raise InputError(expected="a model section that this version knows", found=error) from error
    made = parser.instantiate(parsed)
    return cast(LRM, made["lrm"]), cast(Renderer, made["renderer"])


def load_weights(network: LRM, folder: Path) -> None:
    """Load ``model.safetensors`` of a folder into a network, strictly, in the network's own precision.

    Raises:
        InputError: There is no such file, it cannot be read, or it is of another network.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise InputError(
            expected=f"the weights of a network at {path}",
            found="none",
            remedy="`lrm export RUN OUT` and `lrm convert` make such folders",
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(
            subject=path, expected="safetensors", found=f"a damaged file ({error})", remedy="get it again"
        ) from error
    ours = network.state_dict()
    wrong = [f"{name} is missing" for name in ours if name not in weights]
    wrong += [f"{name} is a stranger" for name in weights if name not in ours]
    wrong += [
        f"{name} has shape {tuple(value.shape)} instead of {tuple(ours[name].shape)}"
        for name, value in weights.items()
        if name in ours and value.shape != ours[name].shape
    ]
    wrong += [
        f"{name} has numbers that are not finite"
        for name, x in weights.items()
        if not torch.isfinite(x).all()
    ]
    if wrong:
        raise InputError(
            subject=path,
            expected="the weights of this network",
            found=f"{len(wrong)} differences: {'; '.join(wrong[:6])}"
            + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""),
            remedy=f"build the network of its own config: -c {folder / CONFIG_NAME}",
        )
    network.load_state_dict(weights, strict=True)


def read_pretrained(folder: Path) -> tuple[LRM, Renderer]:
    """Build the network of a folder, in evaluation mode, and its renderer.

    Raises:
        InputError: The folder is not what it should be.
    """
    network, renderer = build_network(read_model_section(folder / CONFIG_NAME))
    load_weights(network, folder)
    return network.eval(), renderer
