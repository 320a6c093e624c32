"""Classes as users write them, for class paths of configs."""

from lightning.pytorch.loggers import Logger

from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.losses.objective import Objective
from lrm_pl.training.module import LRMModule


class OtherLogger(Logger):
    """A logger without a folder."""

    name, version = "other", 0

    def __init__(self, color: str = "red") -> None:
        super().__init__()
        self.color, self.steps = color, []

    def log_metrics(self, metrics, step=None):
        self.steps.append(step)

    def log_hyperparams(self, params, *args, **kwargs):
        self.params = params


class OwnObjective(Objective):
    """One term more.

    Args:
        weight: Of the planes' mean square.
        options: Of ``Objective``.
    """

    def __init__(self, weight: float = 0.1, **options) -> None:
        super().__init__(**options)
        self.weight = weight

    def forward(self, evidence, step):
        return super().forward(evidence, step) | {"planes": self.weight * evidence.planes.square().mean()}


class OwnModule(LRMModule):
    """Counts its steps.

    Args:
        extra: A field of its own.
        options: Of ``LRMModule``.
    """

    def __init__(self, extra: int = 1, **options) -> None:
        super().__init__(**options)
        self.extra, self.steps = extra, 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


class OwnData(ShardDataModule):
    """Takes a field more.

    Args:
        note: Of no effect.
        options: Of ``ShardDataModule``.
    """

    def __init__(self, note: str = "", **options) -> None:
        super().__init__(**options)
        self.note = note
