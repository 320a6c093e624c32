"""Measurement of the time per phase of an optimizer step, the throughput and the peak memory.

Phases are marked by forward hooks, by Lightning's callback hooks and, for data loading, by ``DataWaitProfiler``. The
README of this folder lists the logged metrics and their units.
"""

import logging
from collections.abc import Callable
from typing import final

import lightning as L
import torch

from lrm_pl.callbacks.data_wait import DataWaitProfiler
from lrm_pl.callbacks.phase_clock import PhaseClock
from lrm_pl.callbacks.utilization import BatchSize, UtilizationMeter
from lrm_pl.data.batch import Batch
from lrm_pl.planning.memory import peak_memory
from lrm_pl.training.module import LRMModule
from lrm_pl.training.step_logging import is_logged_step

logger = logging.getLogger(__name__)

PHASES = ("data_wait", "encoder", "transformer", "renderer", "losses", "backward", "optimizer", "other")

#: Phase of validation, which is excluded from all totals.
PAUSE = "pause"


@final
class StepTimer(L.Callback):
    """Callback that logs ``time/<phase>``, ``time/step``, ``speed/*`` and ``memory/*_gib`` at the logging steps.

    Times are in milliseconds per optimizer step of this process, averaged over the steps since the last logged step.
    The phases sum to ``time/step``. Rates cover all processes. Validation is excluded.

    ``speed/mfu`` is the model FLOPs utilization, that is, the FLOP/s of the forward and backward passes of the model,
    without recomputation, as a fraction of the peak bf16 FLOP/s of the devices (PaLM, appendix B). It is omitted if the
    peak is unknown.

    The time spent waiting for data is measured if ``trainer.profiler`` is a ``DataWaitProfiler``. Otherwise, it is
    included in ``time/other``.
    """

    def __init__(self) -> None:
        self._clock: PhaseClock | None = None  # only while training runs
        self._steps = 0
        self._batches: list[BatchSize] = []
        self._meter: UtilizationMeter | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Record the shapes of the network before it is sharded."""
        if stage == "fit":
            assert isinstance(pl_module, LRMModule)
            self._meter = UtilizationMeter(pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Register the hooks and start the clock."""
        assert isinstance(pl_module, LRMModule)
        self._steps, self._batches = 0, []
        self._clock = PhaseClock(trainer.strategy.root_device)
        self._register_hooks(pl_module)
        profiler = trainer.profiler  # type: ignore[attr-defined]
        if isinstance(profiler, DataWaitProfiler):
            profiler.clock = self._clock
        else:
            logger.info(
                "time/data_wait is included in time/other, because trainer.profiler is not a DataWaitProfiler"
            )
        self._switch("other")

    def on_before_backward(self, *_: object) -> None:
        """Start the backward phase."""
        self._switch("backward")

    def on_after_backward(self, *_: object) -> None:
        """End the backward phase."""
        self._switch("other")

    def on_before_optimizer_step(self, *_: object) -> None:
        """Start the optimizer phase, which lasts until the end of the batch."""
        self._switch("optimizer")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Record the size of the batch, and log metrics at logging steps."""
        assert self._clock is not None
        self._switch("other")
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        before = trainer.global_step - ends_step
        self._batches.append(BatchSize(len(batch.ids), batch.target.alpha.numel(), before))
        self._steps += ends_step
        if not (ends_step and is_logged_step(trainer, trainer.global_step)):
            return
        spent = self._clock.pop_totals()
        total = max(sum(ms for phase, ms in spent.items() if phase != PAUSE), 1e-6)
        per_second = 1000 * trainer.world_size / total
        mfu = self._utilization(pl_module.device, total / 1000)
        pl_module.log_dict(
            {
                "speed/samples_per_second": per_second * sum(one.objects for one in self._batches),
                "speed/rays_per_second": per_second * sum(one.pixels for one in self._batches),
                "speed/data_wait_fraction": spent.get("data_wait", 0.0) / total,
                "time/step": total / self._steps,
                **({} if mfu is None else {"speed/mfu": mfu}),
                **{f"time/{phase}": spent.get(phase, 0.0) / self._steps for phase in PHASES},
                **peak_memory(pl_module.device),
            }
        )
        self._steps, self._batches = 0, []

    def on_validation_start(self, *_: object) -> None:
        """Exclude validation, including the startup of its data loader workers, from the measured time."""
        if self._clock is not None:
            self._clock.rename(PAUSE)

    def on_train_end(self, trainer: L.Trainer, *_: object, **__: object) -> None:
        """Remove the forward hooks, and reset the clock of the profiler to None."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._clock = [], None
        if isinstance(trainer.profiler, DataWaitProfiler):  # type: ignore[attr-defined]
            trainer.profiler.clock = None  # type: ignore[attr-defined]

    on_exception = on_train_end

    def _utilization(self, device: torch.device, seconds: float) -> float | None:
        """Return the model FLOPs utilization. The duration of this computation is not measured."""
        assert self._meter is not None
        self._switch(PAUSE)
        utilization = self._meter.utilization(self._batches, device, seconds)
        self._switch("other")
        return utilization

    def _switch(self, phase: str) -> None:
        assert self._clock is not None
        self._clock.switch(phase)

    def _register_hooks(self, module: LRMModule) -> None:
        def switch_to(phase: str) -> Callable[..., None]:
            return lambda *_: self._switch(phase) if module.training else None

        lrm, renderer, objective = module.lrm, module.renderer, module.objective
        self._hooks = [
            lrm.encoder.register_forward_pre_hook(switch_to("encoder")),
            lrm.encoder.register_forward_hook(switch_to("transformer")),
            lrm.upsampler.register_forward_hook(switch_to("renderer")),
            renderer.register_forward_pre_hook(switch_to("renderer")),
            renderer.register_forward_hook(switch_to("other")),
            objective.register_forward_pre_hook(switch_to("losses")),
            objective.register_forward_hook(switch_to("other")),
        ]
