"""Functions that select the steps to log, and that log the step as the x-axis of other values."""

import lightning as L
import torch


def is_logged_step(trainer: L.Trainer, step: int) -> bool:
    """Return whether a step is logged.

    Args:
        trainer: The trainer. If ``log_every_n_steps`` is 0, no step is logged.
        step: Number of completed optimizer steps including this step.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


def log_global_step(module: L.LightningModule, step: int) -> None:
    """Log the number of completed optimizer steps as the x-axis of other values.

    Lightning uses the logged value "step" as the x-axis instead of an internal counter, which is smaller by 1.

    Args:
        module: The module that logs the values.
        step: Number of completed optimizer steps.
    """
    # If it were a float, Lightning would copy it to the device and synchronize.
    module.log("step", torch.full((), float(step), device=module.device))
