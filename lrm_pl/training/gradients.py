"""The gradient of a step, measured once: judged, then clipped. A bad one is left out by all ranks alike.

The verdict is of the norm after backward, which is of the gradient summed over ranks: so all ranks come to the same
one, whichever of them met the NaN.
"""

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lrm_pl.errors import InputError
from lrm_pl.training.parallel import whole


class DivergedError(InputError):
    """Training went wrong too many steps in a row; the last good state is kept."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a step is left out: weights, moments and averages stay as they are, the step counts.

    Attributes:
        patience: So many steps left out in a row stop the run.
        spike: A gradient norm above so many times its running median is left out too; null never.
        window: Steps that the median is of; none is called a spike before so many were seen.
    """

    patience: int = 10
    spike: float | None = None
    window: int = 100

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.patience < 1 or self.window < 1 or (self.spike is not None and self.spike <= 1):
            raise InputError(f"expected patience and window of at least 1 and a spike above 1, found {self}")


class GradientGuard:
    """Judge one gradient norm a step.

    Attributes:
        skipped: Steps left out so far.
        in_a_row: Of these, the ones since the last good step.
        last: The norm that was judged last.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped, self.in_a_row = 0, 0
        self.last = math.nan
        self._norms: deque[float] = deque(maxlen=config.window)

    def accepts(self, norm: float) -> bool:
        """Say whether a step with this gradient norm may be taken, and count it."""
        self.last = norm
        good = math.isfinite(norm) and not self._is_spike(norm)
        if good:
            self._norms.append(norm)
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        return good

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were left out."""
        return self.in_a_row >= self.config.patience

    @property
    def expectation(self) -> str:
        """What the last gradient should have been, for a message."""
        if not math.isfinite(self.last):
            return "finite gradients"
        return f"gradient norms up to {self.config.spike} times their running median, {self._median:.3g}"

    @property
    def remedy(self) -> str:
        """What may help besides a lower learning rate, for a message."""
        return "train in 32-true" if not math.isfinite(self.last) else "raise --model.guard.spike"

    def state(self) -> dict[str, int | list[float]]:
        """Return what a resumed run needs to judge alike."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "norms": list(self._norms)}

    def resume(self, state: dict[str, int | list[float]]) -> None:
        """Go on from ``state``; a run that had given up gets a new chance, and a new median."""
        assert isinstance(state["skipped"], int)
        assert isinstance(state["in_a_row"], int)
        assert isinstance(state["norms"], list)
        self.skipped = state["skipped"]
        gave_up = state["in_a_row"] >= self.config.patience
        self.in_a_row = 0 if gave_up else state["in_a_row"]
        self._norms = deque([] if gave_up else state["norms"], maxlen=self.config.window)

    def _is_spike(self, norm: float) -> bool:
        if self.config.spike is None or len(self._norms) < self.config.window:
            return False
        return norm > self.config.spike * self._median

    @property
    def _median(self) -> float:
        return statistics.median(self._norms)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Measure the 2-norm of all gradients together, over all shards; a scalar, the same on every rank."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def clip(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale gradients of this norm down to the norm ``limit`` where they exceed it."""
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
