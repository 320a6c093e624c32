"""Export of a checkpoint to a model folder."""

import logging
from pathlib import Path

import torch
import yaml
from torch import Tensor

from lrm_pl.checkpoints import Checkpoint, averaged_names, read_newest, read_tensors, tensor_specs
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.data.manifest import new_folder, require_no_folder
from lrm_pl.errors import InputError
from lrm_pl.inference.model_card import collect_run_facts, model_card
from lrm_pl.inference.model_folder import (
    FRAMING_NAME,
    find_config,
    read_framing,
    read_model_section,
    write_model_folder,
)

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def export(
    source: str, out: Path, *, average: bool = False, dtype: str = "float32", config: Path | None = None
) -> tuple[Checkpoint, Path]:
    """Write the weights of a checkpoint and the section ``model`` of the config into a new model folder.

    Args:
        source: Path or URL of a checkpoint or of a run folder. The newest valid checkpoint of a run is used.
        out: Path of the model folder, which must not exist.
        average: Whether to export the moving average of the weights.
        dtype: Floating-point type of the weights, "float32" or "bf16".
        config: Path of the config.yaml of the run. If None, the file in the run folder is used.

    Returns:
        The checkpoint and the path of the config.

    Raises:
        InputError: The checkpoint or the config does not exist, or the folder exists.
    """
    require_no_folder(out)
    checkpoint, tensors = read_newest(source, lambda found: (found, _weights(found, average=average)))
    config = find_config(checkpoint, config)
    model = read_model_section(config)
    weights = {name: _cast(tensor, _DTYPES[dtype]) for name, tensor in tensors.items()}
    header = f"Model section of {config.name}; the weights are from step {checkpoint.step} of that run."
    kind = "Moving average of the weights" if average else "Weights"
    facts = collect_run_facts(
        config.parent, yaml.safe_load(config.read_text()), checkpoint.step, average=average
    )
    card = model_card(out.name, f"{kind} at step {checkpoint.step} of a run.", model, facts)
    framing = read_framing(config.parent)
    if framing is None:
        logger.warning(
            "%s has no %s: writing the framing of the LRM paper; edit %s if the training images differ",
            config.parent, FRAMING_NAME, out / FRAMING_NAME,
        )  # fmt: skip
        framing = InputFraming()
    with new_folder(out) as folder:
        write_model_folder(folder, model, weights, header, framing, card, checkpoint.step)
    return checkpoint, config


def _weights(checkpoint: Checkpoint, *, average: bool) -> dict[str, Tensor]:
    """Read the state dict of the network from a checkpoint."""
    specs = tensor_specs(checkpoint)
    names = [name.removeprefix("network.") for name in specs if name.startswith("network.")]
    averaged = averaged_names(checkpoint) if average else []
    if not names:
        raise InputError(
            subject=checkpoint.path,
            expected="the weights of a network",
            found="none",
            remedy="export another checkpoint",
        )
    sources = {name: f"{'average' if name in averaged else 'network'}.{name}" for name in names}
    tensors = {name: torch.empty_like(specs[source], device="cpu") for name, source in sources.items()}
    read_tensors(checkpoint, {sources[name]: tensor for name, tensor in tensors.items()})
    return tensors


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor.contiguous()
