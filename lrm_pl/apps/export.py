"""``lrm export CKPT OUT``: from a checkpoint of any strategy to a folder with config.yaml and model.safetensors."""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor

from lrm_pl.apps.paths import user_path
from lrm_pl.data.input_setup import InputSetup
from lrm_pl.data.manifest import require_no_folder
from lrm_pl.errors import InputError
from lrm_pl.io.checkpoints import Checkpoint, averaged_names, read_newest, read_tensors, tensor_specs
from lrm_pl.io.model_card import model_card, run_facts
from lrm_pl.io.pretrained import (
    CARD_NAME,
    CONFIG_NAME,
    SETUP_NAME,
    WEIGHTS_NAME,
    find_config,
    read_model_section,
    read_setup,
    write_pretrained,
)

logger = logging.getLogger(__name__)

#: What --dtype may be.
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


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
    weights = {name: _cast(tensor, DTYPES[dtype]) for name, tensor in tensors.items()}
    header = f"The model section of {config.name} of the run whose step {checkpoint.step} this is."
    what = "The moving average of the weights" if average else "The weights"
    facts = run_facts(config.parent, yaml.safe_load(config.read_text()))
    card = model_card(out.name, f"{what} at step {checkpoint.step} of a run.", model, facts)
    setup = read_setup(config.parent)
    if setup is None:
        logger.warning(
            "%s: expected %s beside it, which says how training pictures were taken, found none; LRM's numbers are "
            "written, correct them in %s where they are wrong", config, SETUP_NAME, out / SETUP_NAME,
        )  # fmt: skip
        setup = InputSetup()
    write_pretrained(out, model, weights, header, setup, card, checkpoint.step)
    return checkpoint, config


def _weights(checkpoint: Checkpoint, *, average: bool) -> dict[str, Tensor]:
    """Read the network's tensors, by the names of its state dict."""
    specs = tensor_specs(checkpoint)
    names = [name.removeprefix("network.") for name in specs if name.startswith("network.")]
    averaged = averaged_names(checkpoint) if average else []
    if not names:
        raise InputError(f"{checkpoint.path}: expected the weights of a network, found none; export another")
    sources = {name: f"{'average' if name in averaged else 'network'}.{name}" for name in names}
    tensors = {name: torch.empty_like(specs[source], device="cpu") for name, source in sources.items()}
    read_tensors(checkpoint, {sources[name]: tensor for name, tensor in tensors.items()})
    return tensors


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous() if tensor.is_floating_point() else tensor.contiguous()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; expected errors end in one message."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(prog="lrm export", description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="CKPT", help="a checkpoint, or a run's folder: its newest whole one"
    )
    parser.add_argument("out", metavar="OUT", type=user_path, help="the folder to make")
    parser.add_argument("--average", action="store_true", help="the moving average instead of the weights")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the file (float32)")
    parser.add_argument(
        "--config", type=user_path, help="the run's config.yaml, where it is not above the checkpoint"
    )
    given = parser.parse_args(sys.argv[2:] if arguments is None else arguments)
    try:
        checkpoint, config = export(
            given.checkpoint, given.out, average=given.average, dtype=given.dtype, config=given.config
        )
    except (InputError, OSError) as error:
        sys.exit(f"lrm: {error}")
    what = "moving average" if given.average else "weights"
    size = (given.out / WEIGHTS_NAME).stat().st_size / 1e6
    print(f"{given.out / WEIGHTS_NAME}: {what} of {checkpoint.path}, {given.dtype}, {size:.1f} MB")
    print(f"{given.out / CONFIG_NAME}: its model section; {given.out / CARD_NAME}: its model card")
    print(f"Use it: lrm infer PICTURE --ckpt {shlex.quote(str(given.out))}")
    layers = ["-c", str(config), "--ckpt_path", checkpoint.path, "--data.val_objects", "null"]
    print(f"Measure that checkpoint: {shlex.join(['lrm', 'validate', *layers])}")
