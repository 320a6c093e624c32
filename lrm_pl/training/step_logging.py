"""Select the steps that are logged, and set their position on the x-axis of loggers."""

import lightning as L
import torch


def is_logged_step(trainer: L.Trainer, step: int) -> bool:
    """Return whether a step is logged.

    Args:
        trainer: The trainer; ``log_every_n_steps: 0`` disables logging of steps.
        step: Number of optimizer steps done, including this one.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


def log_global_step(module: L.LightningModule, step: int) -> None:
    """Use the number of optimizer steps done as the x-axis of the values logged with it.

    Lightning uses the logged value "step" instead of its own counter, which is one lower.
    """
    # Lightning would copy a float to the device and synchronize.
    module.log("step", torch.full((), float(step), device=module.device))
