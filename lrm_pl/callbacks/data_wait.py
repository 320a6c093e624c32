"""A profiler that measures only the time during which training waits for batches."""

from typing import final

from lightning.pytorch.profilers import PassThroughProfiler

from lrm_pl.callbacks.phase_clock import PhaseClock

#: Action that the training loop reports to ``trainer.profiler`` while it waits for a batch.
FETCH_ACTION = "[_TrainingEpochLoop].train_dataloader_next"


@final
class DataWaitProfiler(PassThroughProfiler):
    """Profiler that records the time spent waiting for a batch as the ``data_wait`` phase of ``StepTimer``.

    Attributes:
        clock: Clock of ``StepTimer``, which sets this attribute during training. If None, nothing is recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock: PhaseClock | None = None

    def start(self, action_name: str) -> None:
        """Start the phase ``data_wait`` when the training loop requests a batch."""
        if self.clock is not None and action_name == FETCH_ACTION:
            self.clock.switch("data_wait")

    def stop(self, action_name: str) -> None:
        """End the phase when the batch has arrived."""
        if self.clock is not None and action_name == FETCH_ACTION:
            self.clock.switch("other")
