"""A rank that hangs ends the job: with the stacks of all its threads in the log, within a set time.

A rank that waits for one that hangs makes no progress either, so every rank of the job says where it is and exits.
The clock is a thread outside Python: it strikes even while Python's own lock is held, and does not count the time that
the process is suspended.
"""

from typing import Any, final

import lightning as L

from lrm_pl.callbacks.awake_clock import AwakeClock
from lrm_pl.errors import InputError

#: Ranks of a node strike so many seconds one after the other, so that their stacks do not mix in one log.
STAGGER_S = 0.25


@final
class HangWatchdog(L.Callback):
    """End the process where no batch and no checkpoint was finished for too long.

    Args:
        limit_s: Seconds without progress, in which the process was not suspended. The longest thing that is no hang
            must fit in: compiling, the first load of a large data set, a checkpoint on a slow disk.
    """

    def __init__(self, limit_s: float = 1800.0) -> None:
        if limit_s <= 0:
            raise InputError(
                expected="limit_s above 0", found=limit_s, remedy="leave the callback out to have none"
            )
        self.limit_s = limit_s
        self._clock: AwakeClock | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin: from here on ranks talk to each other."""
        self._stop()
        self._clock = AwakeClock(self.limit_s + STAGGER_S * trainer.local_rank)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop watching."""
        self._stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Stop watching."""
        self._stop()

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.stop()
            self._clock = None

    def _arm(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - the hooks' own arguments
        if self._clock is not None:
            self._clock.reset()

    # The checkpoint is saved between the start of a batch and backward, and at the end of training.
    on_train_start = on_train_batch_start = on_before_backward = on_train_batch_end = on_train_end = _arm
    on_validation_start = on_validation_batch_start = on_validation_end = _arm
    on_test_start = on_test_batch_start = on_test_end = _arm
    on_predict_start = on_predict_batch_start = on_predict_batch_end = on_predict_end = _arm
