"""Deletion of old checkpoints of a run, except for the newest, the best and periodically kept checkpoints."""

import logging
import math
from typing import Literal

from lrm_pl.checkpoints.index import (
    CheckpointError,
    checkpoint_step,
    list_checkpoints,
    read_checkpoint,
    read_index,
    remove_checkpoint,
)

logger = logging.getLogger(__name__)

#: Whether the highest or the lowest value of a metric is the best.
Mode = Literal["max", "min"]

#: Factor by which a metric is multiplied so that the highest value is the best.
MODE_SIGNS: dict[Mode, float] = {"max": 1.0, "min": -1.0}


class Retention:
    """Retention policy for the checkpoints of a run.

    Damaged checkpoints are neither counted nor deleted. An existing checkpoint is considered damaged if its step is
    later than ``last``, or if its score is better than the score of the best valid checkpoint.

    Args:
        folder: Folder of the checkpoints.
        last: Step of the newest valid checkpoint. If None, no checkpoint in the folder is valid.
        keep: Number of most recent checkpoints to keep.
        keep_every: Number of steps between checkpoints that are never deleted, or None.
        monitor: Name of the metric that determines the best checkpoint. If None, the metric of a score is ignored.
        mode: Whether the highest or the lowest value of the metric is the best.
    """

    def __init__(
        self,
        folder: str,
        last: int | None,
        keep: int,
        keep_every: int | None = None,
        monitor: str | None = None,
        mode: Mode = "max",
    ) -> None:
        self.folder, self.keep, self.keep_every, self.sign = folder, keep, keep_every, MODE_SIGNS[mode]
        paths = [
            path for path in list_checkpoints(folder) if last is not None and checkpoint_step(path) <= last
        ]
        self._scores = {path: _stored_score(path, monitor) for path in paths}
        while (best := self._best_path()) is not None:
            try:
                read_checkpoint(best)
                break
            except CheckpointError as error:
                logger.warning("The best checkpoint is damaged and no longer counts as the best. %s", error)
                del self._scores[best]

    @property
    def best(self) -> float | None:
        """Score of the best checkpoint, or None if no checkpoint has a score."""
        path = self._best_path()
        return None if path is None else self._scores[path]

    def add(self, path: str, score: float | None) -> None:
        """Add a new checkpoint and delete old checkpoints."""
        self._scores[path] = score
        ordered = sorted(self._scores, key=checkpoint_step)
        for old in ordered[: -self.keep]:
            every_nth = self.keep_every is not None and checkpoint_step(old) % self.keep_every == 0
            if every_nth or old == self._best_path():
                continue
            try:
                remove_checkpoint(old)
            except OSError as error:  # the new checkpoint is complete
                logger.warning("Old checkpoints in %s could not be deleted: %s", self.folder, error)
                return
            del self._scores[old]

    def _best_path(self) -> str | None:
        scores = {path: self.sign * score for path, score in self._scores.items() if score is not None}
        return max(scores, key=lambda path: (scores[path], checkpoint_step(path)), default=None)


def _stored_score(path: str, monitor: str | None) -> float | None:
    """Return the score of a checkpoint, or None if the checkpoint is incomplete or has no score for the metric."""
    try:
        run = read_index(path).run
    except CheckpointError:
        return None
    score = run.get("score")
    other_metric = monitor is not None and run.get("monitor", monitor) != monitor
    return None if score is None or math.isnan(score) or other_metric else float(score)
