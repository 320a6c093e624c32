"""Saving and restoring a run (tensors, data position, gradient guard, gradient scaler and callbacks)."""

import json
import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lrm_pl.checkpoints.index import Checkpoint
from lrm_pl.checkpoints.tensors import tensor_names
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.training.ema import WeightAverage
from lrm_pl.training.module import LRMModule
from lrm_pl.training.sharded_state import StateTensor, read_state, state_access

logger = logging.getLogger(__name__)

#: Prefix of optional tensors -> effect of resuming from a checkpoint that does not contain them.
OPTIONAL = {"adam": "the optimizer state starts empty", "average": "the average starts from the weights"}


def run_tensors(trainer: L.Trainer, module: LRMModule) -> dict[str, StateTensor]:
    """Return a mapping from tensor names to the tensors of a checkpoint, which are not copied.

    The tensors are the weights, the optimizer state and the moving average.
    """
    access = state_access(trainer, module.lrm)
    tensors = access.network() | access.optimizer_state()
    for callback in _averages(trainer):
        tensors |= {f"average.{name}": tensor for name, tensor in callback.average.items()}
    return tensors


def run_metadata(trainer: L.Trainer, module: LRMModule, step: int) -> dict[str, Any]:
    """Return the non-tensor state after ``step`` steps, which is JSON-serializable and equal on all ranks."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return {
        "position": require_data_module(trainer).position(step),
        "guard": module.guard.state(),
        "scaler": {} if scaler is None else scaler.state_dict(),
        "callbacks": callback_states(trainer),
    }


def load_run(trainer: L.Trainer, module: LRMModule, checkpoint: Checkpoint) -> None:
    """Restore the state of a run from a checkpoint. All ranks must call this together before the first step.

    Raises:
        CheckpointError: A tensor of the network is missing or has a different shape.
    """
    averages = _averages(trainer)
    for callback in averages:
        callback.reset(module)
    tensors = run_tensors(trainer, module)
    stored = {name.partition(".")[0] for name in tensor_names(checkpoint)}
    missing = {name.partition(".")[0] for name in tensors} & (OPTIONAL.keys() - stored)
    tensors = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in missing}
    if trainer.is_global_zero:
        for prefix in sorted(missing):
            logger.warning(
                "%s contains no tensors named %s.*, so %s", checkpoint.path, prefix, OPTIONAL[prefix]
            )
        if "average" in stored and not averages:
            logger.warning(
                "%s contains a moving average, which is ignored, because this run has no WeightAverage callback",
                checkpoint.path,
            )
    read_state(checkpoint, tensors)
    state_access(trainer, module.lrm).apply_changes()
    if "average" not in stored:
        for callback in averages:  # start from the weights that were read
            callback.reset(module)
    module.guard.load_state(checkpoint.run["guard"])
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and checkpoint.run["scaler"]:
        scaler.load_state_dict(checkpoint.run["scaler"])
    load_callback_states(trainer, checkpoint.run.get("callbacks", {}))
    require_data_module(trainer).resume(checkpoint.step, int(checkpoint.run["position"]))
    set_progress(trainer, checkpoint.step)


def set_progress(trainer: L.Trainer, step: int) -> None:
    """Set the counters of Lightning's loops to ``step`` completed optimizer steps.

    The loop state in Lightning checkpoints is not used, because it depends on gradient accumulation and world size.
    """
    loop = trainer.fit_loop.epoch_loop
    steps = loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.ready = steps.completed = step
    loop._batches_that_stepped = step
    batches = loop.batch_progress.total
    batches.ready = batches.completed = step * trainer.accumulate_grad_batches


def _averages(trainer: L.Trainer) -> list[WeightAverage]:
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]  # type: ignore[attr-defined]


def require_data_module(trainer: L.Trainer) -> ShardDataModule:
    """Return the data module of the trainer, whose position is part of a checkpoint.

    Raises:
        InputError: The trainer has no ``ShardDataModule``.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ShardDataModule):
        raise InputError(
            expected="a ShardDataModule, which CheckpointAndResume needs to save the data position",
            found="none" if data is None else f"a {type(data).__name__}",
            remedy="call trainer.fit(module, ShardDataModule(...)), or remove CheckpointAndResume",
        )
    return data


#: Key of a tensor encoded as the dictionary ``{_TENSOR: [dtype, values]}``.
_TENSOR = "__tensor__"


def callback_states(trainer: L.Trainer) -> dict[str, Any]:
    """Return the states of callbacks (``Callback.state_dict``) as JSON-serializable values.

    States that contain unsupported types are omitted with a warning.
    """
    states = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if state := callback.state_dict():
            try:
                states[callback.state_key] = json.loads(json.dumps(state, default=_encoded))
            except TypeError as error:
                if trainer.is_global_zero:
                    name = callback.state_key
                    logger.warning(
                        "The state of %s is not saved, so a resumed run resets it: %s", name, error
                    )
    return states


def load_callback_states(trainer: L.Trainer, states: dict[str, Any]) -> None:
    """Restore the states of callbacks, except for the patience of ``EarlyStopping``, which the config sets."""
    states = json.loads(json.dumps(states), object_hook=_decoded)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if state := states.get(callback.state_key):
            if isinstance(callback, EarlyStopping):
                state["patience"] = callback.patience
            callback.load_state_dict(state)


def _encoded(value: object) -> dict[str, Any]:
    if isinstance(value, torch.Tensor) and not value.is_complex():
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), value.tolist()]}
    raise TypeError(f"expected numbers, strings, lists and tensors, but found {type(value).__name__}")


def _decoded(value: dict[str, Any]) -> dict[str, Any] | torch.Tensor:
    if value.keys() != {_TENSOR}:
        return value
    dtype, numbers = value[_TENSOR]
    return torch.tensor(numbers, dtype=getattr(torch, dtype))
