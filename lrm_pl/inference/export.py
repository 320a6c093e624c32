"""From a checkpoint of any strategy to a folder with config.yaml and model.safetensors."""

import logging
from pathlib import Path

import torch
import yaml
from torch import Tensor

from lrm_pl.checkpoints import Checkpoint, averaged_names, read_newest, read_tensors, tensor_specs
from lrm_pl.data.input_framing import InputFraming
from lrm_pl.data.manifest import require_no_folder
from lrm_pl.errors import InputError
from lrm_pl.inference.model_card import model_card, run_facts
from lrm_pl.inference.model_folder import (
    SETUP_NAME,
    find_config,
    read_model_section,
    read_setup,
    write_pretrained,
)

logger = logging.getLogger(__name__)

#: By the names of ``--dtype``.
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def export(
    source: str, out: Path, *, average: bool = False, dtype: str = "float32", config: Path | None = None
) -> tuple[Checkpoint, Path]:
    """Write the weights of a checkpoint, and the model section of its run's config, into a new folder.

    Args:
        source: A checkpoint, or the folder of a run, whose newest whole one is taken; a path or a URL.
        out: The folder, which must not exist; it appears when it is whole.
        average: Whether the moving average takes the place of the weights that are trained.
        dtype: "float32" or "bf16", for everything that is floating point.
        config: The run's config.yaml; None: the one above the checkpoint.

    Returns:
        The checkpoint, and the config that was taken.

    Raises:
        InputError: Something of this is not there, or OUT is.
    """
    require_no_folder(out)
    checkpoint, tensors = read_newest(source, lambda found: (found, _weights(found, average=average)))
    config = find_config(checkpoint, config)
    model = read_model_section(config)
    weights = {name: _cast(tensor, _DTYPES[dtype]) for name, tensor in tensors.items()}
    header = f"The model section of {config.name} of the run whose step {checkpoint.step} this is."
    what = "The moving average of the weights" if average else "The weights"
    facts = run_facts(config.parent, yaml.safe_load(config.read_text()), checkpoint.step, average=average)
    card = model_card(out.name, f"{what} at step {checkpoint.step} of a run.", model, facts)
    setup = read_setup(config.parent)
    if setup is None:
        logger.warning(
            "%s: expected %s beside it, which says how training images were taken, but found none; LRM's numbers are "
            "written, correct them in %s where they are wrong", config, SETUP_NAME, out / SETUP_NAME,
        )  # fmt: skip
        setup = InputFraming()
    write_pretrained(out, model, weights, header, setup, card, checkpoint.step)
    return checkpoint, config


def _weights(checkpoint: Checkpoint, *, average: bool) -> dict[str, Tensor]:
    """Read the network's tensors, by the names of its state dict."""
    specs = tensor_specs(checkpoint)
    names = [name.removeprefix("network.") for name in specs if name.startswith("network.")]
    averaged = averaged_names(checkpoint) if average else []
    if not names:
        raise InputError(
            subject=checkpoint.path,
            expected="the weights of a network",
            found="none",
            remedy="export another",
        )
    sources = {name: f"{'average' if name in averaged else 'network'}.{name}" for name in names}
    tensors = {name: torch.empty_like(specs[source], device="cpu") for name, source in sources.items()}
    read_tensors(checkpoint, {sources[name]: tensor for name, tensor in tensors.items()})
    return tensors


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor.contiguous()
