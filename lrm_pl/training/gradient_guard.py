"""Skip steps with a bad gradient, and clip the others.

The decision is made from the norm of the gradient summed over ranks, so all ranks decide alike whichever of them met
the NaN. It is made and carried out on the gradient's device: the host learns of it later.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import HostCopy
from lrm_pl.training.parallelize import whole


class DivergedError(InputError):
    """Training went wrong too many steps in a row; the last good state is kept."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a step is skipped: weights, moments and averages stay as they are, the step counts.

    Attributes:
        patience: Number of skipped steps in a row that stops the run.
        spike: Skip steps whose gradient norm exceeds this multiple of the running median; null: never.
        window: Number of accepted steps that the median is over; nothing is a spike before there are as many.
    """

    patience: int = 10
    spike: float | None = None
    window: int = 100

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.patience < 1 or self.window < 1 or (self.spike is not None and self.spike <= 1):
            raise InputError(expected="patience and window of at least 1 and a spike above 1", found=self)


class GradientGuard:
    """Decide from the norm of each step's gradient whether the step is skipped.

    ``judge`` never waits for an accelerator. ``state`` and the properties wait for the newest norm; ``exhausted``
    does so only if the newest step could be the one too many.

    Attributes:
        skip: () 1 if the newest step is skipped, else 0; on the gradient's device.
        num_skipped: () steps skipped so far, the newest included; on the gradient's device.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.resume({"skipped": 0, "in_a_row": 0, "norms": []})

    def resume(self, state: dict[str, int | list[float]]) -> None:
        """Continue from ``state``; a run that had given up gets a new chance, and a new median."""
        assert isinstance(state["skipped"], int)
        assert isinstance(state["in_a_row"], int)
        assert isinstance(state["norms"], list)
        gave_up, window = state["in_a_row"] >= self.config.patience, self.config.window
        with torch.device("cpu"):  # also where the network is made on the meta device
            self.num_skipped = torch.tensor(float(state["skipped"]))
            self._in_a_row = torch.tensor(0.0 if gave_up else float(state["in_a_row"]))
            #: Accepted norms, oldest first; NaN in front while there are fewer than the window.
            self._norms = torch.tensor(([math.nan] * window + ([] if gave_up else state["norms"]))[-window:])
            self.skip, unknown = torch.zeros(()), torch.tensor(math.nan)
            #: Of the step before the newest, and of the newest.
            self._reports: deque[HostCopy] = deque(maxlen=2)
            for _ in range(2):
                self._report(unknown, unknown)

    def judge(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return 1 if a step with this gradient norm is to be skipped, else 0; count it."""
        norm = norm.detach().float()
        norms, in_a_row = self._norms.to(norm.device), self._in_a_row.to(norm.device)
        bad, median = is_bad(norm, norms, self.config.spike)
        self.skip = bad.float()
        self.num_skipped = self.num_skipped.to(norm.device) + self.skip
        self._in_a_row = (in_a_row + 1) * self.skip
        self._norms = torch.where(bad, norms, torch.cat([norms[1:], norm[None]]))
        self._report(norm, median)
        return self.skip

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped."""
        before = int(self._reports[0].numbers()[1])
        return before + 1 >= self.config.patience and self.in_a_row >= self.config.patience

    @property
    def in_a_row(self) -> int:
        """Steps skipped since the last good one."""
        return int(self._reports[-1].numbers()[1])

    @property
    def last(self) -> float:
        """Norm of the newest gradient; NaN before the first."""
        return self._reports[-1].numbers()[2]

    @property
    def expectation(self) -> str:
        """What the newest gradient should have been, for a message."""
        _, _, norm, median, *_ = self._reports[-1].numbers()
        if not math.isfinite(norm):
            return "finite gradients"
        return f"gradient norms up to {self.config.spike} times their running median, {median:.3g}"

    @property
    def remedy(self) -> str:
        """What may help besides a lower learning rate, for a message."""
        return "train in 32-true" if not math.isfinite(self.last) else "raise --model.guard.spike"

    def state(self) -> dict[str, int | list[float]]:
        """Return what a resumed run needs to decide alike, as JSON can hold it."""
        skipped, in_a_row, _, _, *norms = self._reports[-1].numbers()
        return {
            "skipped": int(skipped),
            "in_a_row": int(in_a_row),
            "norms": [norm for norm in norms if not math.isnan(norm)],
        }

    def _report(self, norm: Float[Tensor, ""], median: Float[Tensor, ""]) -> None:
        counts = torch.stack([self.num_skipped, self._in_a_row, norm, median])
        self._reports.append(HostCopy(torch.cat([counts, self._norms])))


def is_bad(
    norm: Float[Tensor, ""], accepted: Float[Tensor, "N"], spike: float | None
) -> tuple[Bool[Tensor, ""], Float[Tensor, ""]]:
    """Return whether a gradient norm is not finite or a spike, and the median of the accepted norms.

    Args:
        norm: The norm.
        accepted: Norms of earlier steps, oldest first; NaN in front if there were fewer, then nothing is a spike.
        spike: Factor on their median above which a norm is a spike; None: nothing is.
    """
    ordered = accepted.sort().values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    bad = ~norm.isfinite()
    if spike is not None:
        bad = bad | (norm > spike * median) & ~accepted[0].isnan()
    return bad, median


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Measure the 2-norm of all gradients together, over all shards; a scalar, the same on every rank."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients))


def clip(parameters: Sequence[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scale gradients of this norm down to the norm ``limit`` where they exceed it."""
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
