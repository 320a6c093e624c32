"""Gradient guard, which skips optimizer steps whose gradient is not finite or too large.

The decision is based on the norm of the gradient after reduction over ranks, so it is the same on all ranks. It is made
and applied on the device of the gradient, and copied to the host asynchronously.
"""

import dataclasses
import math
from collections import deque

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import HostCopy


class DivergedError(InputError):
    """Exception that is raised if too many consecutive steps were skipped. The state before these steps was saved."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Criteria for skipping an optimizer step.

    A skipped step is counted, but it does not change weights, the optimizer state or the moving average of the weights.

    Attributes:
        patience: Number of consecutive skipped steps after which the run stops.
        spike: Maximum ratio of the gradient norm to the running median of the norms of accepted steps. A step with a
            larger ratio is skipped. If None, only steps with a gradient that is not finite are skipped.
        window: Number of accepted steps over which the median is computed. ``spike`` has no effect until this number of
            steps has been accepted.
    """

    patience: int = 10
    spike: float | None = None
    window: int = 100

    def __post_init__(self) -> None:
        """Check that the values are in the supported ranges."""
        if self.patience < 1 or self.window < 1 or (self.spike is not None and self.spike <= 1):
            raise InputError(expected="patience and window of at least 1 and a spike above 1", found=self)


class GradientGuard:
    """Decide from the gradient norm whether to skip a step.

    ``check`` does not synchronize with the device. ``state`` and the properties wait for the newest norm, except that
    ``exhausted`` waits only if the newest step can exhaust the patience.

    Attributes:
        skip: Scalar tensor on the device of the gradient, which is 1 if the newest step is skipped and 0 otherwise.
        num_skipped: Scalar tensor on the device of the gradient with the number of steps skipped so far.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.load_state({"skipped": 0, "consecutive": 0, "norms": []})

    def load_state(self, state: dict[str, int | list[float]]) -> None:
        """Restore a state. If the patience was exhausted, reset the number of consecutive skips and the median."""
        assert isinstance(state["skipped"], int)
        assert isinstance(state["consecutive"], int)
        assert isinstance(state["norms"], list)
        restart, window = state["consecutive"] >= self.config.patience, self.config.window
        with torch.device("cpu"):  # the network may be built under torch.device("meta")
            self.num_skipped = torch.tensor(float(state["skipped"]))
            self._consecutive = torch.tensor(0.0 if restart else float(state["consecutive"]))
            #: (window,) accepted norms in ascending order of steps, with NaN in front if there are fewer.
            self._norms = torch.tensor(([math.nan] * window + ([] if restart else state["norms"]))[-window:])
            self.skip, unknown = torch.zeros(()), torch.tensor(math.nan)
            #: Host copies of the last two steps.
            self._reports: deque[HostCopy] = deque(maxlen=2)
            for _ in range(2):
                self._report(unknown, unknown)

    def check(self, norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return 1 if a step with this gradient norm must be skipped, else 0, and update the state."""
        norm = norm.detach().float()
        norms, consecutive = self._norms.to(norm.device), self._consecutive.to(norm.device)
        ordered = norms.sort().values  # NaN is last, so the median is NaN until the window is full
        median = (ordered[(len(norms) - 1) // 2] + ordered[len(norms) // 2]) / 2 + 0 * ordered[-1]
        bad = ~norm.isfinite()
        if self.config.spike is not None:
            bad = bad | (norm > self.config.spike * median)
        self.skip = bad.float()
        self.num_skipped = self.num_skipped.to(norm.device) + self.skip
        self._consecutive = (consecutive + 1) * self.skip
        self._norms = torch.where(bad, norms, torch.cat([norms[1:], norm[None]]))
        self._report(norm, median)
        return self.skip

    @property
    def exhausted(self) -> bool:
        """Whether the number of consecutive skipped steps has reached the patience."""
        before = int(self._reports[0].numbers()[1])
        return before + 1 >= self.config.patience and self.consecutive_skips >= self.config.patience

    @property
    def consecutive_skips(self) -> int:
        """Number of steps skipped since the last accepted step."""
        return int(self._reports[-1].numbers()[1])

    @property
    def last(self) -> float:
        """Norm of the newest gradient, or NaN before the first step."""
        return self._reports[-1].numbers()[2]

    @property
    def expectation(self) -> str:
        """Description of the criterion that the newest gradient does not meet, for error messages."""
        _, _, norm, median, *_ = self._reports[-1].numbers()
        if not math.isfinite(norm):
            return "finite gradients"
        return f"gradient norms up to {self.config.spike} times their running median, {median:.3g}"

    @property
    def remedy(self) -> str:
        """Suggested alternative to lowering the learning rate, for error messages."""
        return "train in 32-true" if not math.isfinite(self.last) else "raise --model.guard.spike"

    def state(self) -> dict[str, int | list[float]]:
        """Return the state as a JSON-serializable dictionary."""
        skipped, consecutive, _, _, *norms = self._reports[-1].numbers()
        return {
            "skipped": int(skipped),
            "consecutive": int(consecutive),
            "norms": [norm for norm in norms if not math.isnan(norm)],
        }

    def _report(self, norm: Float[Tensor, ""], median: Float[Tensor, ""]) -> None:
        counts = torch.stack([self.num_skipped, self._consecutive, norm, median])
        self._reports.append(HostCopy(torch.cat([counts, self._norms])))
