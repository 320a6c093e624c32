"""Which steps are logged."""

import lightning as L


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Return whether Lightning logs a step.

    Args:
        trainer: The trainer; its ``log_every_n_steps: 0`` logs none.
        step: Number of optimizer steps that are done with it.
    """
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0
