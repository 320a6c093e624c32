"""Select the steps that are logged, and set their position on the loggers' x axis."""

import lightning as L
import torch


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Return whether Lightning logs a step.

    Args:
        trainer: The trainer; its ``log_every_n_steps: 0`` logs none.
        step: Number of optimizer steps that are done with it.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


def log_step(module: L.LightningModule, step: int) -> None:
    """Put what is logged with this at the number of optimizer steps done, as checkpoints and images are.

    Lightning's own axis is one behind; it takes the logged value "step" in place of it.
    """
    # A float would be copied to the device, and waited for.
    module.log("step", torch.full((), float(step), device=module.device))
