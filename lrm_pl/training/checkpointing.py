"""Callback that saves checkpoints, resumes runs from checkpoints and stops runs early.

The checkpoint of a step is saved at the start of the first batch of the next step. At that time, the validation and
the logging of the step are complete, so a resumed run repeats neither.
"""

import errno
import logging
import math
import os
import threading
from pathlib import Path
from typing import final

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger

from lrm_pl.checkpoints.index import Checkpoint, checkpoint_path, finalize_checkpoint, read_index
from lrm_pl.checkpoints.owner import Owner
from lrm_pl.checkpoints.retention import MODE_SIGNS, Mode, Retention
from lrm_pl.checkpoints.selection import choose_checkpoint
from lrm_pl.checkpoints.tensors import write_tensors
from lrm_pl.data.batch import Batch
from lrm_pl.errors import InputError
from lrm_pl.storage import is_local
from lrm_pl.training.bad_samples import BadSamples, BadSamplesError
from lrm_pl.training.collectives import gather_objects, raise_on_all_ranks
from lrm_pl.training.gradient_guard import DivergedError
from lrm_pl.training.module import LRMModule
from lrm_pl.training.run_folder import RunLock, trainer_folder
from lrm_pl.training.run_state import load_run, require_data_module, run_metadata, run_tensors
from lrm_pl.training.sharded_state import Snapshots
from lrm_pl.training.signals import StopSignals

logger = logging.getLogger(__name__)

#: Error numbers of a full disk and of an exhausted quota.
NO_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT)


class StoppedError(InputError):
    """Error raised after a signal has stopped the run early. A checkpoint was saved, and the run can be resumed."""


@final
class CheckpointAndResume(L.Callback):
    """Save checkpoints, resume from them, and stop the run on a signal, on divergence or on too many bad samples.

    ``Trainer.fit`` resumes from the newest valid checkpoint in the folder, unless ``choose`` selected a checkpoint.

    Args:
        every: Number of steps between checkpoints. The last step is always saved.
        keep: Number of most recent checkpoints to keep.
        keep_every: Number of steps between checkpoints that are never deleted, or None.
        monitor: Name of the validation metric whose best checkpoint is also saved and kept, or None.
        mode: "max" if higher values of the metric are better, or "min" if lower values are better.
        folder: Folder or URL (``s3://``, ``gs://``) of the checkpoints. If None, ``checkpoints`` in the run folder.
        background: Whether to write checkpoints in a background thread. On a CPU, training waits until the state has
            been copied. On an accelerator, only the next optimizer step waits for the copy.
    """

    def __init__(
        self,
        every: int = 500,
        keep: int = 2,
        keep_every: int | None = None,
        monitor: str | None = "val/heldout/psnr_pooled",
        folder: str | None = None,
        *,
        background: bool = True,
        mode: Mode = "max",
    ) -> None:
        if min(every, keep, 1 if keep_every is None else keep_every) < 1:
            found = f"every={every}, keep={keep} and keep_every={keep_every}"
            raise InputError(expected="every, keep and keep_every of at least 1", found=found)
        self.every, self.keep, self.keep_every, self.monitor = every, keep, keep_every, monitor
        self.background, self.mode = background, mode
        self.folder = folder and os.path.expanduser(folder)
        #: The checkpoint to resume from, set only on rank 0. If None, the run starts from the first step.
        self.resume_from: Checkpoint | None = None
        self._chosen = False
        #: Whether the signal handlers remain installed, so that the caller restores them and raises ``stopped``.
        self.keep_signal_handlers = False
        #: Signature of the run in a checkpoint folder outside of the run folder, set only on rank 0 before the run.
        self.owner: Owner | None = None
        #: Error that stopped the run before the last step, or None.
        self.stopped: InputError | None = None
        #: Path of the newest complete checkpoint, set only on rank 0.
        self.newest: str | None = None
        self.signals = StopSignals()
        #: Gloo groups of all ranks. Separate groups allow reductions of flags while the thread writes a checkpoint.
        self._group: torch.distributed.ProcessGroup | None = None
        self._flag_group: torch.distributed.ProcessGroup | None = None
        self._snapshots: Snapshots | None = None
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None  # raised in the writing thread
        self._saved = -1  # newest step with a checkpoint
        self._score: float | None = None  # score of a validation since the last step
        self._best: float | None = None
        self._warned = False  # whether the warning about a missing monitored metric was logged
        self._lock: RunLock | None = None  # only on rank 0, and only if ``choose`` was not called
        self._retention: Retention | None = None  # only on rank 0

    # --- resuming

    def choose(self, resume: str) -> Checkpoint | None:
        """Choose the checkpoint to resume from. Call this on rank 0, before ``Trainer.fit``.

        Args:
            resume: "auto" to select the newest valid checkpoint in the folder, "never" to start from the first step
                and reject a folder with checkpoints, or the path of a checkpoint or run.

        Raises:
            InputError: The folder has checkpoints and ``resume`` is "never", or a path has no valid checkpoint.
        """
        self.resume_from, self._chosen = choose_checkpoint(resume, self.folder), True
        return self.resume_from

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the checkpoint that rank 0 chose."""
        assert isinstance(pl_module, LRMModule)
        require_data_module(trainer)
        if torch.distributed.is_initialized():
            self._group, self._flag_group = _gloo_group(), _gloo_group()
        self._snapshots = Snapshots(trainer.strategy.root_device)
        self.folder = trainer.strategy.broadcast(self.folder or f"{trainer_folder(trainer)}/checkpoints")
        with raise_on_all_ranks(trainer):
            if trainer.is_global_zero:
                self._choose_on_rank_zero(trainer)
        self._chosen, self._saved = False, -1
        self.signals.listen(trainer)
        path = None if self.resume_from is None else self.resume_from.path
        best = None if self._retention is None else self._retention.best
        path, self._best = trainer.strategy.broadcast((path, best))
        if path is None:
            return
        checkpoint = self.resume_from or read_index(path)  # rank 0 has verified its files
        load_run(trainer, pl_module, checkpoint)
        self._saved, self.newest = checkpoint.step, path
        if trainer.is_global_zero:
            logger.info("Resuming after step %d from %s", checkpoint.step, path)
        if any(isinstance(c, EarlyStopping) and c.wait_count >= c.patience for c in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.should_stop = True
            if trainer.is_global_zero:
                message = "EarlyStopping ended this run at step %d. Increase its patience to continue"
                logger.warning(message, checkpoint.step)

    def _choose_on_rank_zero(self, trainer: L.Trainer) -> None:
        """Lock the folder, and choose the newest checkpoint if ``choose`` was not called."""
        folder = str(self.folder)
        if not self._chosen:
            self._lock = RunLock(Path(folder)) if is_local(folder) else None
            self.choose("auto")
        found = self.resume_from
        if found is not None and trainer.ckpt_path is not None:
            raise InputError(
                expected="one checkpoint to resume from",
                found=f"ckpt_path {trainer.ckpt_path} and the checkpoint {found.path}",
                remedy="omit ckpt_path, or choose a different folder for CheckpointAndResume",
            )
        last = None if found is None else found.step
        self._retention = Retention(folder, last, self.keep, self.keep_every, self.monitor, self.mode)

    # --- between steps

    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        """Store the value of the monitored metric."""
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        self._score = None if value is None or math.isnan(value) else float(value)
        if self.monitor and value is None and not (self._warned or trainer.sanity_checking):
            self._warned = True
            if trainer.is_global_zero:
                names = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
                logger.warning(
                    "No best checkpoint is kept, because validation does not log the metric %s. "
                    "The logged metrics are: %s",
                    self.monitor,
                    ", ".join(names) or "none",
                )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Save a checkpoint if required, and stop all ranks if any rank received a signal."""
        assert isinstance(pl_module, LRMModule)
        if batch_idx % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        signaled, failed = self._agree(self.signals.received is not None, self._failure is not None)
        if failed:
            self._join()
            raise self._write_error(trainer, step)
        self.stopped = self._run_error(trainer, pl_module, step)
        if self.stopped is None and signaled:
            self.stopped = StoppedError(f"The run was stopped by a signal after step {step}")
        due = step % self.every == 0 or self._improved() or self.stopped is not None
        if due and step > max(self._saved, 0):
            self._save(trainer, pl_module, step)
        self._score = None
        if self.stopped is not None:
            trainer.should_stop = True

    def on_before_optimizer_step(self, *_: object, **__: object) -> None:
        """Delay the optimizer step on the device until the state has been copied for a checkpoint."""
        if self._writing is not None:
            assert self._snapshots is not None
            self._snapshots.stream.block_current()

    on_train_batch_end = on_before_optimizer_step  # a validation may swap the weights with their average

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a checkpoint of the last step and wait until it is written."""
        assert isinstance(pl_module, LRMModule)
        self.stopped = self.stopped or self._run_error(trainer, pl_module, trainer.global_step)
        if trainer.global_step > self._saved:
            self._save(trainer, pl_module, trainer.global_step)
        self._join()
        if any(self._agree(self._failure is not None)):
            raise self._write_error(trainer, trainer.global_step)
        if self.stopped is not None and trainer.is_global_zero:
            self.stopped = type(self.stopped)(
                f"{self.stopped}. The state was saved in {self.newest}. To resume, run the same command with "
                f"--run.folder {trainer_folder(trainer)}"
            )

    def on_fit_end(self, *_: object) -> None:
        """Raise the error that stopped the run early, so that a script does not continue."""
        if self.stopped is not None and not self.keep_signal_handlers:
            raise self.stopped

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Wait until a checkpoint is written, release the lock of the folder and restore the signal handlers."""
        self._join()
        self._lock = None
        self.signals.restore()
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            logger.warning("Interrupted at step %d. %s", trainer.global_step, self._newest_message())

    def teardown(self, *_: object, **__: object) -> None:
        """Release the lock of the folder and restore the signal handlers."""
        self._lock = None
        if not self.keep_signal_handlers:
            self.signals.restore()

    def _agree(self, *flags: bool) -> list[bool]:
        """Return whether any rank has set each flag, without synchronizing with an accelerator."""
        values = torch.tensor(flags, dtype=torch.int32)
        if self._flag_group is not None:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, self._flag_group)
        return [bool(flag) for flag in values.tolist()]

    def _newest_message(self) -> str:
        if self.newest is None:
            return "No checkpoint was completed"
        return f"The newest complete checkpoint is {self.newest}"

    def _write_error(self, trainer: L.Trainer, step: int) -> Exception:
        """Return the error for a checkpoint that could not be written."""
        error = self._failure
        if error is not None and not isinstance(error, OSError):
            return error
        cause = "see the log of another rank" if error is None else str(error)
        newest = f". {self._newest_message()}" if trainer.is_global_zero else ""
        remedy = "Free some space" if getattr(error, "errno", None) in NO_SPACE_ERRORS else "Fix the cause"
        return InputError(
            f"A checkpoint could not be written to {self.folder} (detected at step {step}): {cause}{newest}. "
            f"{remedy} and run the same command again to resume"
        )

    def _run_error(self, trainer: L.Trainer, module: LRMModule, step: int) -> InputError | None:
        """Return an error if the run has diverged or has too many bad samples, or None otherwise."""
        if module.guard.exhausted:
            return DivergedError(self._divergence_message(trainer, module, step))
        bad = next((c.error for c in trainer.callbacks if isinstance(c, BadSamples)), None)  # type: ignore[attr-defined]
        return None if bad is None else BadSamplesError(bad)

    def _divergence_message(self, trainer: L.Trainer, module: LRMModule, step: int) -> str:
        self._join()  # the writing thread uses the same process group
        ids = sorted(key for rank in gather_objects(module.current_sample_ids, self._group) for key in rank)
        guard = module.guard
        return (
            f"Expected {guard.expectation}, but found {guard.consecutive_skips} consecutive violations up to step "
            f"{step}, the last with norm {guard.last:.3g}. Check the samples of the last step ({', '.join(ids)}), "
            f"lower the learning rate, or {guard.remedy}"
        )

    # --- saving

    def _save(self, trainer: L.Trainer, module: LRMModule, step: int) -> None:
        """Copy the state and write a checkpoint, in the background if ``background`` is set."""
        self._join()
        with raise_on_all_ranks(trainer):
            if self.owner is not None:
                self.owner.require()
        for log in trainer.loggers:  # a resumed run does not log these steps again
            log.save()
            if isinstance(log, TensorBoardLogger):
                log.experiment.flush()
        snapshots, sharded, score = self._snapshots, module.device_mesh is not None, self._score
        assert snapshots is not None
        writes = sharded or trainer.is_global_zero
        copy = snapshots.take(run_tensors(trainer, module), sharded=sharded, keep=writes)
        run = run_metadata(trainer, module, step) | {"score": score, "monitor": self.monitor}
        path = checkpoint_path(str(self.folder), step)

        def write() -> None:
            try:
                snapshots.stream.synchronize()
                files = write_tensors(path, copy, self._group if sharded else None) if writes else {}
                if self._retention is not None:  # on rank 0
                    finalize_checkpoint(path, step, run, files)
                    self.newest = path
                    self._retention.add(path, score)
            except Exception as error:  # the main thread raises it
                self._failure = error

        self._saved = step
        if self._improved():
            self._best = self._score
        self._writing = threading.Thread(target=write, name=f"checkpoint {step}")
        self._writing.start()
        if not self.background:
            self._join()

    def _improved(self) -> bool:
        """Return whether the score of the last validation is the best score of the run."""
        if self._score is None or self._best is None:
            return self._score is not None
        return (self._score - self._best) * MODE_SIGNS[self.mode] > 0

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None


def _gloo_group() -> torch.distributed.ProcessGroup:
    group = torch.distributed.new_group(backend="gloo")
    assert isinstance(group, torch.distributed.ProcessGroup)  # this rank is a member
    return group
