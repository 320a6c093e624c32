"""Bad samples in training: named once, counted over all ranks, and too many of them end the run.

A bad sample's place is taken by the next good one of its stream (``lrm_pl.data.order``), so no rank waits for another
and a run survives a truncated shard. But a run that quietly trains on half of its data is worse than one that stops.
"""

import logging
from typing import Any

import lightning as L
import torch

from lrm_pl.data.batch import Batch
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.training.logged import is_logged

logger = logging.getLogger(__name__)

#: Samples of all ranks that are read before their share of bad ones is judged.
_LEAST = 100

#: Bad samples that the closing message lists.
_LISTED = 20


class BadSamplesError(InputError):
    """More samples are bad than may be; the message lists them."""


class BadSamples(L.Callback):
    """Count bad samples, and say when there are more than ``data.max_bad_fraction`` allows.

    The share is that of the samples read since the run was started, judged from 100 samples on.

    Attributes:
        too_many: What is wrong, for a message; None while the share is small enough. The same on every rank.
    """

    def __init__(self) -> None:
        self.too_many: str | None = None
        self._bad = self._seen = 0
        self._named: dict[str, None] = {}  # in the order in which they were met

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Name what is new; where a line of the log is due, count over all ranks and judge."""
        for met in batch.faults:
            self._seen += 1
            self._bad += bool(met)
            for message in met:
                if message not in self._named:
                    self._named[message] = None
                    logger.warning("skipped %s", message)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        last = trainer.global_step >= trainer.max_steps
        if not (is_logged(trainer, trainer.global_step) or last):
            return
        counts = torch.tensor([self._bad, self._seen], dtype=torch.float64, device=pl_module.device)
        bad, seen = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        pl_module.log_dict({"data/bad_samples": bad, "data/bad_share": bad / seen})
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ShardDataModule)
        if seen >= _LEAST and bad > data.max_bad_fraction * seen:
            self.too_many = (
                f"expected at most {data.max_bad_fraction:.3g} of the samples to be bad, but found {bad:.0f} "
                f"of {seen:.0f}:\n"
                f"  {self._listed(trainer)}\nmend them, or let more pass: --data.max_bad_fraction"
            )

    def _listed(self, trainer: L.Trainer) -> str:
        lists: list[list[str]] = [list(self._named)[:_LISTED]]
        if trainer.world_size > 1:
            lists *= trainer.world_size
            torch.distributed.all_gather_object(lists, lists[0])
        named = list(dict.fromkeys(message for rank in lists for message in rank))
        shown = "\n  ".join(named[:_LISTED])
        more = f"\n  and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
        return f"{shown}{more}"
