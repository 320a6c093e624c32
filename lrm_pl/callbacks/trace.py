"""Profiler traces of a few training steps, for Perfetto or Chrome."""

import logging
from typing import final

import lightning as L
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import profile, schedule

from lrm_pl.data.batch import Batch
from lrm_pl.errors import InputError
from lrm_pl.kernels.device import profiler_activities
from lrm_pl.training.run_folder import trainer_folder

logger = logging.getLogger(__name__)

#: Number of steps before the trace, in which kernels are compiled, caches are filled and loader workers are started.
WARMUP = 5


@final
class TraceRecorder(L.Callback):
    """Callback that profiles optimizer steps of rank 0 after a warm-up and writes a trace to the run folder.

    Args:
        steps: Number of steps to record.
    """

    def __init__(self, steps: int) -> None:
        if steps < 1:
            raise InputError(expected="at least 1 step to profile", found=steps)
        self.steps = steps
        self._profile: profile | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the profiler schedule.

        Raises:
            InputError: The run has too few steps. If a resumed run has too few steps left, a warning is logged instead.
        """
        left, needed = trainer.max_steps - trainer.global_step, WARMUP + self.steps
        if left < needed and trainer.global_step:
            logger.warning("No trace is recorded: only %d steps remain, but %d are required", left, needed)
            return
        if left < needed:
            raise InputError(
                expected=f"at least {needed} steps ({WARMUP} for warm-up and {self.steps} to profile)",
                found=left,
                remedy="increase --trainer.max_steps or decrease --run.profile",
            )
        if not trainer.is_global_zero:
            return
        first = trainer.global_step + WARMUP + 1
        name = f"rank0-steps-{first}-{first + self.steps - 1}.pt.trace.json"
        path = trainer_folder(trainer) / "profile" / name

        def write(recorded: profile) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
            logger.info(
                "Wrote a trace of %d steps to %s. View the trace at https://ui.perfetto.dev", self.steps, path
            )

        self._profile = profile(
            activities=profiler_activities(pl_module.device),
            schedule=schedule(wait=WARMUP - 1, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=write,
            # On a CPU, the renderer starts threads, which are not traced by default.
            experimental_config=_ExperimentalConfig(profile_all_threads=True),
        )
        self._profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Advance the profiler schedule."""
        if self._profile is not None and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._profile.step()

    def on_train_end(self, *_: object, **__: object) -> None:
        """Stop the profiler."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    on_exception = on_train_end
