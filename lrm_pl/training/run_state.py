"""What of a run goes into a checkpoint, and how it comes back: tensors, place in the data, guard, scaler, callbacks."""

import logging
from typing import Any

import lightning as L

from lrm_pl.checkpoints import Checkpoint, tensor_names
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.training.callback_states import callback_states, load_callback_states
from lrm_pl.training.ema import WeightAverage
from lrm_pl.training.module import LRMModule
from lrm_pl.training.sharded_state import holder_of
from lrm_pl.training.state import Held, average_tensors, read_state

logger = logging.getLogger(__name__)

#: Tensors that a checkpoint may lack -> what is said then.
OPTIONAL = {"adam": "the optimizer's moments start anew", "average": "it starts at the weights"}


def run_tensors(trainer: L.Trainer, module: LRMModule) -> dict[str, Held]:
    """Name the weights, AdamW's moments and the moving average of a run; they are its own."""
    holder = holder_of(trainer, module.lrm)
    tensors = holder.network() | holder.moments()
    for callback in _averages(trainer):
        tensors |= average_tensors(callback.average)
    return tensors


def run_numbers(trainer: L.Trainer, module: LRMModule, step: int) -> dict[str, Any]:
    """Return what else a run is made of after ``step`` steps, the same on every rank, as JSON can hold it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "position": data_of(trainer).position(step),
        "guard": module.guard.state(),
        "scaler": {} if scaler is None else scaler.state_dict(),
        "callbacks": callback_states(trainer),
    }


def load_run(trainer: L.Trainer, module: LRMModule, checkpoint: Checkpoint) -> None:
    """Make a run that is about to start go on from a checkpoint; all ranks call this together.

    Raises:
        CheckpointError: A tensor of the network is missing, or a shape is another.
    """
    for callback in _averages(trainer):
        callback.begin(module)
    tensors = run_tensors(trainer, module)
    found = tensor_names(checkpoint)
    for kind, lost in OPTIONAL.items():
        if any(name.startswith(f"{kind}.") for name in found):
            continue
        if any(name.startswith(f"{kind}.") for name in tensors) and trainer.is_global_zero:
            logger.warning("%s holds nothing under %r: %s", checkpoint.path, kind, lost)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{kind}.")}
    if (
        not _averages(trainer)
        and any(name.startswith("average.") for name in found)
        and trainer.is_global_zero
    ):
        logger.warning(
            "%s holds a moving average, which this run does not go on with: it has no WeightAverage among "
            "trainer.callbacks", checkpoint.path,
        )  # fmt: skip
    read_state(checkpoint, tensors)
    holder_of(trainer, module.lrm).changed()
    if not any(name.startswith("average.") for name in tensors):
        for callback in _averages(trainer):  # of the weights that have been read
            callback.begin(module)
    module.guard.resume(checkpoint.run["guard"])
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and checkpoint.run["scaler"]:
        scaler.load_state_dict(checkpoint.run["scaler"])
    load_callback_states(trainer, checkpoint.run.get("callbacks", {}))
    data_of(trainer).resume(checkpoint.step, int(checkpoint.run["position"]))
    set_progress(trainer, checkpoint.step)


def set_progress(trainer: L.Trainer, step: int) -> None:
    """Tell Lightning's loops that ``step`` optimizer steps are done, as if they had been done in this process.

    Its own loop state is not used: that is of a moment inside a step, and of one accumulation and world size.
    """
    loop = trainer.fit_loop.epoch_loop
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.ready = steps.completed = step
    loop._batches_that_stepped = step
    batches = loop.batch_progress.total
    batches.ready = batches.completed = step * trainer.accumulate_grad_batches


def _averages(trainer: L.Trainer) -> list[WeightAverage]:
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]  # type: ignore[attr-defined]


def data_of(trainer: L.Trainer) -> ShardDataModule:
    """Return the data module, whose position a checkpoint holds.

    Raises:
        InputError: The trainer has none, or another one.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ShardDataModule):
        found = "none" if data is None else f"a {type(data).__name__}"
        raise InputError(
            expected="a ShardDataModule to fit with, whose position a CheckpointAndResume's checkpoints hold",
            found=found,
            remedy="give it: trainer.fit(module, ShardDataModule(...)), or leave the CheckpointAndResume out",
        )
    return data
