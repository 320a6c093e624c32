"""What keeps a run: it saves, resumes where it was, and stops in time. All of it happens between two steps.

Between two steps means at the start of the next step's first batch: by then the step's validation and its log lines
are done, so a checkpoint is of everything up to the step, and a resumed run does and logs nothing twice.
"""

import errno
import logging
import math
import os
import threading
from pathlib import Path
from typing import Any, final

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger

from lrm_pl.checkpoints import (
    SIGNS,
    Checkpoint,
    Format,
    Mode,
    Owner,
    best_score,
    checkpoint_path,
    choose_checkpoint,
    complete,
    list_checkpoints,
    read_index,
    step_of,
    tidy,
    write_tensors,
)
from lrm_pl.data.batch import Batch
from lrm_pl.errors import InputError
from lrm_pl.storage import is_local
from lrm_pl.training.bad_samples import BadSamples, BadSamplesError
from lrm_pl.training.gradient_guard import DivergedError
from lrm_pl.training.module import LRMModule
from lrm_pl.training.run_lock import RunLock
from lrm_pl.training.run_state import data_of, load_run, run_numbers, run_tensors
from lrm_pl.training.signals import StopSignals
from lrm_pl.training.state import Snapshots

logger = logging.getLogger(__name__)


#: Errors of a disk without room, and of a quota that is used up.
FULL = (errno.ENOSPC, errno.EDQUOT)


class StoppedError(InputError):
    """The run stopped before its last step, with everything kept: started again, it goes on."""


@final
class CheckpointAndResume(L.Callback):
    """Save checkpoints, resume from them, and stop at a signal or when training has gone wrong.

    A run goes on from the newest checkpoint in its folder, unless ``choose`` was called with something else.

    Args:
        every: Steps from one checkpoint to the next. The last step is always kept.
        keep: So many of the newest checkpoints stay.
        keep_every: Checkpoints of multiples of this step stay too; null: none.
        monitor: The checkpoint of the validation with the best value of this metric stays too; null: none.
        mode: "max": the highest value is the best; "min": the lowest, as of LPIPS or a loss.
        layout: "sharded" (a file a rank) or "single"; null: sharded where the network is.
        background: Write while training goes on. On a CPU, training waits for the copy in memory; on an accelerator,
            the device's next optimizer step does.
        folder: Where to; null: ``checkpoints`` in the run's folder. A URL (``s3://``, ``gs://``) is an object store.
    """

    def __init__(
        self,
        every: int = 500,
        keep: int = 2,
        keep_every: int | None = None,
        monitor: str | None = "val/heldout/psnr_pooled",
        layout: Format | None = None,
        folder: str | None = None,
        *,
        background: bool = True,
        mode: Mode = "max",
    ) -> None:
        if every < 1 or keep < 1 or (keep_every is not None and keep_every < 1):
            raise InputError(
                expected="every, keep and keep_every of at least 1", found=f"{every}, {keep}, {keep_every}"
            )
        self.every, self.keep, self.keep_every, self.monitor = every, keep, keep_every, monitor
        self.layout, self.background, self.mode = layout, background, mode
        self.folder = folder and os.path.expanduser(folder)
        #: What to go on from, as rank 0 knows it; None: nothing.
        self.resume_from: Checkpoint | None = None
        self._chosen = False
        #: Whether the caller listens to signals after the fit too, until it calls ``signals.restore()``, and raises
        #: ``stopped`` itself.
        self.listens_on = False
        #: Rank 0's signature in an object store's folder of checkpoints, made before the run starts.
        self.owner: Owner | None = None
        #: Why the run stopped before its last step; None while it has not.
        self.stopped: InputError | None = None
        #: The newest checkpoint that is whole, as rank 0 knows it.
        self.newest: str | None = None
        self.signals = StopSignals()
        #: Of all ranks, on gloo: one for the thread that writes, and one for what is agreed on meanwhile.
        self._group: torch.distributed.ProcessGroup | None = None
        self._agreement: torch.distributed.ProcessGroup | None = None
        self._snapshots: Snapshots | None = None
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None
        self._start, self._saved = 0, -1
        self._validated: float | None = None
        self._best: float | None = None
        self._run = "."
        self._missed = False  # whether a validation without the monitored metric has been spoken of
        self._lock: RunLock | None = None  # of the folder, on rank 0; one who has chosen holds it himself
        #: Checkpoints in the folder that are not whole: newer than the one the run goes on from, or damaged best ones.
        self._passed_over: set[str] = set()

    # --- resuming

    def choose(self, resume: str) -> Checkpoint | None:
        """Choose what to go on from, before a fit; on rank 0.

        Args:
            resume: "auto": the newest whole checkpoint of the folder; "never": none, and none may be there; or the
                path of a checkpoint or run where this one begins.

        Raises:
            InputError: There is nothing where something was asked for, or something where nothing was expected.
        """
        self.resume_from, self._chosen = choose_checkpoint(resume, self.folder), True
        return self.resume_from

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the state of the checkpoint that rank 0 chose."""
        assert isinstance(pl_module, LRMModule)
        data_of(trainer)  # or no checkpoint could be written
        if torch.distributed.is_initialized():
            self._group, self._agreement = _gloo_group(), _gloo_group()
        self._snapshots = Snapshots(trainer.strategy.root_device)
        self._run = trainer.log_dir or trainer.default_root_dir
        self.folder = trainer.strategy.broadcast(self.folder or f"{self._run}/checkpoints")
        self._choose_together(trainer)
        self.signals.listen(trainer)
        path = trainer.strategy.broadcast(None if self.resume_from is None else self.resume_from.path)
        if trainer.is_global_zero:
            after = -1 if self.resume_from is None else self.resume_from.step
            newer = {p for p in list_checkpoints(str(self.folder)) if step_of(p) > after}
            self._best, damaged = best_score(str(self.folder), logger.warning, newer, self.monitor, self.mode)
            self._passed_over = newer | damaged
        self._best = trainer.strategy.broadcast(self._best)
        if path is None:
            return
        checkpoint = self.resume_from or read_index(path)  # rank 0 has checked its files
        load_run(trainer, pl_module, checkpoint)
        self._start = self._saved = checkpoint.step
        self.newest = path
        if trainer.is_global_zero:
            logger.info("going on after step %d from %s", checkpoint.step, path)
        if any(isinstance(c, EarlyStopping) and c.wait_count >= c.patience for c in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.should_stop = True
            if trainer.is_global_zero:
                logger.warning(
                    "EarlyStopping ended this run at step %d: no step is added; a larger patience goes on",
                    checkpoint.step,
                )

    def _choose_together(self, trainer: L.Trainer) -> None:
        """Go on from the newest where nobody has chosen; an error is every rank's."""
        error = None
        if trainer.is_global_zero:
            try:
                if not self._chosen and is_local(str(self.folder)):
                    self._lock = RunLock(Path(str(self.folder)))
                found = self.resume_from if self._chosen else self.choose("auto")
                if found is not None and trainer.ckpt_path is not None:
                    raise InputError(
                        expected="one checkpoint to go on from",
                        found=f"ckpt_path {trainer.ckpt_path} and {found.path}",
                        remedy="leave ckpt_path out, or give the CheckpointAndResume another folder",
                    )
            except (InputError, OSError) as problem:
                error = str(problem)
        error = trainer.strategy.broadcast(error)
        self._chosen = False  # of the next fit nothing is known
        if error is not None:
            raise InputError(error)

    # --- between two steps

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember what the validation found."""
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        self._validated = None if value is None else float(value)
        if self.monitor and value is None and not (self._missed or trainer.sanity_checking):
            self._missed = True
            if trainer.is_global_zero:
                names = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
                logger.warning(
                    "no checkpoint is kept as the best: expected the metric %s in a validation, but found %s",
                    self.monitor,
                    ", ".join(names) or "none",
                )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Save where one is due, and stop where a rank was told to; all ranks agree by one small reduction."""
        assert isinstance(pl_module, LRMModule)
        if batch_idx % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        told, failed = self._agree(self.signals.received is not None, self._failure is not None)
        if failed:
            self._join()
            raise self._explained(trainer, step)
        if pl_module.guard.exhausted:
            self.stopped = DivergedError(self._diverged(trainer, pl_module, step))
        elif (too_many := _bad_samples(trainer)) is not None:
            self.stopped = BadSamplesError(too_many)
        elif told:
            self.stopped = StoppedError(f"stopped by a signal after step {step}")
        improved = self._validated is not None and self._is_better(self._validated)
        if step > self._start and (step % self.every == 0 or improved or self.stopped is not None):
            self._save(trainer, pl_module, step)
        self._validated = None
        if self.stopped is not None:
            trainer.should_stop = True

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let the device change the state only after a checkpoint's copy of it is complete."""
        self._hold_back()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # noqa: ANN401 - Lightning's signature
        """Do the same before a validation, which may put the average in place of the weights."""
        self._hold_back()

    def _hold_back(self) -> None:
        if self._writing is not None:
            assert self._snapshots is not None
            self._snapshots.stream.hold_back_current()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the last step, and wait until it is written."""
        assert isinstance(pl_module, LRMModule)
        if pl_module.guard.exhausted and self.stopped is None:
            self.stopped = DivergedError(self._diverged(trainer, pl_module, trainer.global_step))
        if (too_many := _bad_samples(trainer)) is not None and self.stopped is None:
            self.stopped = BadSamplesError(too_many)
        if trainer.global_step > self._saved:
            self._save(trainer, pl_module, trainer.global_step)
        self._join()
        if any(self._agree(self._failure is not None)):
            raise self._explained(trainer, trainer.global_step)
        if self.stopped is not None and trainer.is_global_zero:
            kind = type(self.stopped)
            self.stopped = kind(
                f"{self.stopped}; everything up to there is in {self.newest}: start the same command with "
                f"--run.folder {self._run} to go on"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise what stopped the run, so that a script does not go on as after its last step."""
        if self.stopped is not None and not self.listens_on:
            raise self.stopped

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Let a checkpoint that is being written be finished."""
        self._join()
        self._lock = None
        self.signals.restore()
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            logger.warning(
                "interrupted at step %d; the newest whole checkpoint is %s",
                trainer.global_step,
                self.newest or "none",
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the folder and the handlers of signals back."""
        self._lock = None
        if not self.listens_on:
            self.signals.restore()

    def _agree(self, *flags: bool) -> list[bool]:
        """Return which flags any rank has set; on the CPU, so that no accelerator is waited for."""
        mine = torch.tensor(flags, dtype=torch.int32)
        if self._agreement is not None:
            torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, self._agreement)
        return [bool(flag) for flag in mine.tolist()]

    def _explained(self, trainer: L.Trainer, step: int) -> Exception:
        """Say that a checkpoint could not be written, and what is left."""
        error = self._failure
        if error is not None and not isinstance(error, OSError):
            return error
        found = "an error on another rank, see its log" if error is None else str(error)
        newest = f"; the newest whole one is {self.newest or 'none'}" if trainer.is_global_zero else ""
        remedy = "Make space" if getattr(error, "errno", None) in FULL else "Mend that"
        return InputError(
            expected=f"to write a checkpoint into {self.folder}",
            found=f"{found}{newest}",
            remedy=f"{remedy} and start the same command again: it goes on from the newest whole one (training was at "
            f"step {step})",
        )

    def _diverged(self, trainer: L.Trainer, module: LRMModule, step: int) -> str:
        self._join()  # its thread talks through the same group
        ids: list[tuple[str, ...]] = [module.current_sample_ids]
        if trainer.world_size > 1:
            ids = [()] * trainer.world_size
            torch.distributed.all_gather_object(ids, module.current_sample_ids, group=self._group)
        return (
            f"expected {module.guard.expectation}, but found {module.guard.in_a_row} bad ones in a row "
            f"by step {step}, the "
            f"last of norm {module.guard.last:.3g}; the samples of the last one: "
            f"{', '.join(sorted(key for rank in ids for key in rank))}; look at these, lower the learning rate, or "
            f"{module.guard.remedy}"
        )

    # --- saving

    def _save(self, trainer: L.Trainer, module: LRMModule, step: int) -> None:
        """Copy the state, and write it in the background."""
        self._join()
        self._require_ownership(trainer)
        for log in trainer.loggers:  # what was logged up to here must not be lost while the checkpoint stays
            log.save()
            if isinstance(log, TensorBoardLogger):
                log.experiment.flush()
        layout = self.layout or ("single" if module.device_mesh is None else "sharded")
        snapshots = self._snapshots
        assert snapshots is not None
        copy = snapshots.take(run_tensors(trainer, module), layout, writes=trainer.is_global_zero)
        run = run_numbers(trainer, module, step) | {"score": self._validated, "monitor": self.monitor}
        path = checkpoint_path(str(self.folder), step)
        first = trainer.is_global_zero

        def write() -> None:
            try:
                snapshots.stream.synchronize()
                files = write_tensors(path, copy, layout, self._group, writes=first)
                if first:
                    complete(path, layout, step, run, files)
                    self.newest = path
                    self._passed_over.discard(path)
                    self._tidy()
            except Exception as error:  # handed to the main thread, which raises it
                self._failure = error

        self._saved = step
        if self._validated is not None and self._is_better(self._validated):
            self._best = self._validated
        self._writing = threading.Thread(target=write, name=f"checkpoint {step}")
        self._writing.start()
        if not self.background:
            self._join()

    def _is_better(self, value: float) -> bool:
        return not math.isnan(value) and (self._best is None or (value - self._best) * SIGNS[self.mode] > 0)

    def _require_ownership(self, trainer: L.Trainer) -> None:
        """Stop on all ranks where another run has taken the folder over."""
        found = None
        if self.owner is not None:
            try:
                self.owner.require()
            except InputError as error:
                found = str(error)
        found = trainer.strategy.broadcast(found)
        if found is not None:
            raise InputError(found)

    def _tidy(self) -> None:
        try:
            tidy(
                str(self.folder),
                keep=self.keep,
                keep_every=self.keep_every,
                apart=self._passed_over,
                monitor=self.monitor,
                mode=self.mode,
            )
        except OSError as error:  # the new checkpoint is whole all the same
            logger.warning("old checkpoints in %s are not deleted: %s", self.folder, error)

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None


def _gloo_group() -> torch.distributed.ProcessGroup:
    group = torch.distributed.new_group(backend="gloo")
    assert isinstance(group, torch.distributed.ProcessGroup)  # of all ranks, so this one is in it
    return group


def _bad_samples(trainer: L.Trainer) -> str | None:
    """Return what the counter of bad samples has to say, where there is one."""
    counters = (c for c in trainer.callbacks if isinstance(c, BadSamples))  # type: ignore[attr-defined]
    return next((counter.too_many for counter in counters), None)
