"""Where the time of a step goes, and what that makes in samples and rays a second; memory.

Nothing in the network knows of it: marks are set by forward hooks, by Lightning's hooks and by wrappers around the
renderer and the objective, for as long as training runs.

data_wait    the loop waits for the next batch (on a GPU: the GPU stands still for it)
encoder      image -> tokens
transformer  camera embedder, blocks, upsampler
renderer     field and rendering, forward only
losses       the objective's terms
backward     all of backward: also the rendering that it does again (``rendering.deferred``), activations that blocks
             recompute, and the exchange of gradients between processes
optimizer    gradient norm, clipping, AdamW
other        the rest: copies to the device, the other callbacks, checkpoints, logging, progress bar
"""

import functools
from collections.abc import Callable
from typing import Any, final

import lightning as L
import torch

from lrm_pl.callbacks.part_clock import PartClock
from lrm_pl.callbacks.utilization import BatchSize, UtilisationMeter
from lrm_pl.data.batch import Batch
from lrm_pl.planning.memory import peak_memory
from lrm_pl.training.logged import is_logged
from lrm_pl.training.module import LRMModule

PARTS = (
    "data_wait",
    "encoder",
    "transformer",
    "renderer",
    "losses",
    "backward",
    "optimizer",
    "other",
)

#: What does not count: validation.
PAUSE = "pause"


@final
class StepTimer(L.Callback):
    """Log ``time/<part>``, ``time/step``, ``speed/*`` and ``memory/*_gib`` at the trainer's logging steps.

    Times are milliseconds an optimizer step, the mean since the last log line, of this process; the parts add up to
    ``time/step``. Rates are of all processes together. Validation does not count.

    ``speed/mfu`` is the share of the devices' bf16 peak that the mathematics of a step needs, forward and backward,
    nothing counted twice (PaLM, appendix B). The peak of a CPU is measured once; of a GPU that
    ``training.costs.machines`` does not know there is none.
    """

    def __init__(self) -> None:
        self._clock: PartClock | None = None
        self._steps = self._samples = self._rays = 0
        self._batches: list[BatchSize] = []
        self._meter: UtilisationMeter | None = None
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the shape of the network while it is whole."""
        if stage == "fit":
            assert isinstance(pl_module, LRMModule)
            self._meter = UtilisationMeter(pl_module, trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the marks and start the clock."""
        assert isinstance(pl_module, LRMModule)
        self._steps = self._samples = self._rays = 0
        self._batches = []
        self._clock = clock = PartClock(trainer.strategy.root_device)
        self._mark_forward(pl_module, clock)
        self._mark_fetching(trainer, clock)
        clock.switch("other")

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor
    ) -> None:
        """Begin backward."""
        self._switch("backward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End it."""
        self._switch("other")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Begin the optimizer's step; the end of the batch ends it."""
        self._switch("optimizer")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count, and log where a line is due."""
        assert self._clock is not None
        self._clock.switch("other")
        self._samples += len(batch.ids) * trainer.world_size
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        before = trainer.global_step - ends_step
        self._batches.append(BatchSize(len(batch.ids), batch.target.alpha.numel(), before))
        self._rays += batch.target.alpha.numel() * trainer.world_size
        if not ends_step:
            return
        self._steps += 1
        if not is_logged(trainer, trainer.global_step):
            return
        spent = self._clock.take()
        total = max(sum(ms for part, ms in spent.items() if part != PAUSE), 1e-6)
        mfu = self._utilization(pl_module.device, total / 1000)
        times = {f"time/{part}": spent.get(part, 0.0) / self._steps for part in PARTS}
        pl_module.log("speed/samples_per_second", 1000 * self._samples / total)
        pl_module.log_dict(
            {
                "speed/rays_per_second": 1000 * self._rays / total,
                "speed/data_wait_share": spent.get("data_wait", 0.0) / total,
                "time/step": total / self._steps,
                **({} if mfu is None else {"speed/mfu": mfu}),
                **times,
                **peak_memory(pl_module.device),
            }
        )
        self._steps = self._samples = self._rays = 0
        self._batches = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out validation, with the start of its loader workers since the last batch."""
        if self._clock is not None:
            self._clock.rename(PAUSE)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the marks away."""
        self._clear()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Take the marks away."""
        self._clear()

    def _utilization(self, device: torch.device, seconds: float) -> float | None:
        """Ask the meter; what it takes the first time does not count."""
        assert self._clock is not None
        assert self._meter is not None
        self._clock.switch(PAUSE)
        share = self._meter.share(self._batches, device, seconds)
        self._clock.switch("other")
        return share

    def _switch(self, part: str) -> None:
        assert self._clock is not None
        self._clock.switch(part)

    def _clear(self) -> None:
        for undo in self._undo:
            undo()
        self._undo, self._clock = [], None

    def _mark_forward(self, module: LRMModule, clock: PartClock) -> None:
        def switch_to(part: str) -> Callable[..., None]:
            return lambda *_: clock.switch(part) if module.training else None

        lrm = module.lrm
        self._undo += [
            lrm.encoder.register_forward_pre_hook(switch_to("encoder")).remove,
            lrm.encoder.register_forward_hook(switch_to("transformer")).remove,
            lrm.upsampler.register_forward_hook(switch_to("renderer")).remove,
        ]
        for name, part in (("renderer", "renderer"), ("objective", "losses")):
            self._undo.append(_wrap(module, name, switch_to(part), switch_to("other")))

    def _mark_fetching(self, trainer: L.Trainer, clock: PartClock) -> None:
        # No public hook lies before the loop asks for a batch; it calls these two around that.
        loop = trainer.fit_loop.epoch_loop

        def before() -> None:
            clock.switch("data_wait")
            type(loop)._on_before_fetch(loop)

        def after() -> None:
            type(loop)._on_after_fetch(loop)
            clock.switch("other")

        for name, mark in (("_on_before_fetch", before), ("_on_after_fetch", after)):
            setattr(loop, name, mark)
            self._undo.append(functools.partial(delattr, loop, name))


class _Marked:
    """A callable with something done before and after each call; its attributes are the callable's own."""

    def __init__(
        self, call: Callable[..., Any], before: Callable[..., None], after: Callable[..., None]
    ) -> None:
        self._call, self._before, self._after = call, before, after

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 - whatever is wrapped
        self._before()
        result = self._call(*arguments, **keywords)
        self._after()
        return result

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever is wrapped
        return getattr(self._call, name)


def _wrap(
    owner: object, name: str, before: Callable[..., None], after: Callable[..., None]
) -> Callable[[], None]:
    original = getattr(owner, name)
    setattr(owner, name, _Marked(original, before, after))
    return lambda: setattr(owner, name, original)
