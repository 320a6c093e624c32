"""Monitoring of bad samples in training, with a limit on their fraction.

A sample is bad if it cannot be read, violates the schema or is rejected by a stage of ``data.stages``. The dataset
replaces it with the next valid sample of the same stream (``lrm_pl.data.order``). A truncated shard therefore neither
stops the run nor makes ranks wait for each other.
"""

import logging

import lightning as L
import torch

from lrm_pl.data.batch import Batch
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.training.collectives import gather_objects
from lrm_pl.training.step_logging import is_logged_step

logger = logging.getLogger(__name__)

#: Minimum number of samples, summed over all ranks, before the fraction of bad samples is checked.
_MIN_SAMPLES = 100

#: Maximum number of bad samples listed in the error message.
_MAX_LISTED = 20


class BadSamplesError(InputError):
    """Error raised if the fraction of bad samples exceeds the limit."""


class BadSamples(L.Callback):
    """Count bad samples and compare their fraction with ``data.max_bad_fraction``.

    The fraction is computed over the samples that all ranks have read since the process started.

    Attributes:
        error: Message that lists the bad samples, or None if the fraction is within the limit. The message is the
            same on all ranks.
    """

    def __init__(self) -> None:
        self.error: str | None = None
        self._num_bad = self._num_seen = 0
        self._messages: dict[str, None] = {}  # an ordered set

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Log new bad samples. On logged steps, also sum the counts over all ranks and check the fraction."""
        for faults in batch.faults:
            self._num_seen += 1
            self._num_bad += bool(faults)
            for message in faults:
                if message not in self._messages:
                    self._messages[message] = None
                    logger.warning("Skipped %s", message)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        last = trainer.global_step >= trainer.max_steps
        if not (is_logged_step(trainer, trainer.global_step) or last):
            return
        counts = torch.tensor([self._num_bad, self._num_seen], dtype=torch.float64, device=pl_module.device)
        bad, seen = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        pl_module.log_dict({"data/bad_samples": bad, "data/bad_fraction": bad / seen})
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ShardDataModule)
        if seen >= _MIN_SAMPLES and bad > data.max_bad_fraction * seen:
            self.error = (
                f"Expected at most a fraction of {data.max_bad_fraction:.3g} of the samples to be bad, but found "
                f"{bad:.0f} of {seen:.0f}:\n"
                f"  {self._list_messages()}\n"
                "Repair or remove these samples, or raise --data.max_bad_fraction"
            )

    def _list_messages(self) -> str:
        lists = gather_objects(list(self._messages)[:_MAX_LISTED])
        messages = list(dict.fromkeys(message for rank in lists for message in rank))
        shown = "\n  ".join(messages[:_MAX_LISTED])
        more = f"\n  and {len(messages) - _MAX_LISTED} more" if len(messages) > _MAX_LISTED else ""
        return f"{shown}{more}"
