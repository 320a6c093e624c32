"""Export of a checkpoint to a model folder."""

from pathlib import Path

import torch
import yaml

from lrm_pl.checkpoints.index import Checkpoint
from lrm_pl.checkpoints.selection import read_newest
from lrm_pl.data.manifest import new_folder, require_no_folder
from lrm_pl.inference.model_card import collect_run_facts, model_card
from lrm_pl.inference.model_folder import find_config, write_model_folder
from lrm_pl.inference.pipeline import LRMPipeline

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def export(
    source: str, out: Path, *, average: bool = False, dtype: str = "float32", config: Path | None = None
) -> tuple[Checkpoint, Path]:
    """Write the weights of a checkpoint and the ``model`` section of the config to a new model folder.

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
    checkpoint, pipeline = read_newest(
        source, lambda found: (found, LRMPipeline.from_checkpoint(found, config, average=average))
    )
    config = find_config(checkpoint, config)
    network = pipeline.network.to(_DTYPES[dtype])
    header = f"Model section of {config.name}; the weights are from step {checkpoint.step} of that run."
    kind = "Moving average of the weights" if average else "Weights"
    facts = collect_run_facts(
        config.parent, yaml.safe_load(config.read_text()), checkpoint.step, average=average
    )
    card = model_card(out.name, f"{kind} at step {checkpoint.step} of a run.", pipeline.model, facts)
    with new_folder(out) as folder:
        write_model_folder(
            folder, pipeline.model, network.state_dict(), header, pipeline.framing, card, checkpoint.step
        )
    return checkpoint, config
