"""The state of a run's callbacks (``Callback.state_dict``) as JSON, which checkpoints hold it in: numbers, no code."""

import json
import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping

logger = logging.getLogger(__name__)

#: Stands for a tensor: {_TENSOR: [dtype, numbers]}.
_TENSOR = "__tensor__"


def callback_states(trainer: L.Trainer) -> dict[str, Any]:
    """Return the states of the callbacks that have one; what JSON cannot hold is left out, and said so."""
    states = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if state := callback.state_dict():
            try:
                states[callback.state_key] = json.loads(json.dumps(state, default=_encoded))
            except TypeError as error:
                if trainer.is_global_zero:
                    logger.warning(
                        "the state of %s is not in the checkpoint, and starts anew in a resumed run: %s",
                        callback.state_key,
                        error,
                    )
    return states


def load_callback_states(trainer: L.Trainer, states: dict[str, Any]) -> None:
    """Give callbacks their states back; a patience is the one that the run is now given, not that of the checkpoint."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in states:
            state = _decoded(states[callback.state_key])
            if isinstance(callback, EarlyStopping):
                state["patience"] = callback.patience
            callback.load_state_dict(state)


def _encoded(value: Any) -> Any:  # noqa: ANN401 - whatever a callback keeps
    if isinstance(value, torch.Tensor) and not value.is_complex():
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), value.tolist()]}
    raise TypeError(f"expected numbers, texts, lists and tensors, but found {type(value).__name__}")


def _decoded(value: Any) -> Any:  # noqa: ANN401 - whatever a callback keeps
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            dtype, numbers = value[_TENSOR]
            return torch.tensor(numbers, dtype=getattr(torch, dtype))
        return {name: _decoded(one) for name, one in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value
