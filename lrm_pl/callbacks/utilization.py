"""What share of a device's peak a run reaches (model FLOPs utilization)."""

import dataclasses
import logging
from collections.abc import Sequence

import lightning as L
import torch

from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.transforms import CropConfig
from lrm_pl.kernels.device import gpu_properties
from lrm_pl.planning.gpus import peak_flops
from lrm_pl.planning.hits import cameras_of, default_cameras, hit_share
from lrm_pl.planning.simulate import StepCosts, StepShape, simulate_step, without_numbers
from lrm_pl.training.module import LRMModule

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """What a process computed at once.

    Attributes:
        objects: Objects.
        pixels: Target pixels of all of them.
        step: Optimizer steps done before.
    """

    objects: int
    pixels: int
    step: int


class UtilisationMeter:
    """Count what batches need, by a simulated step, made when it is first asked for.

    Args:
        module: What is trained, before it is divided; only its shapes are kept.
        data: What it is trained on: the share of rays that hit depends on its cameras and crops.
    """

    def __init__(self, module: LRMModule, data: L.LightningDataModule | None = None) -> None:
        self.lrm = without_numbers(module.lrm)
        self.renderer, self.objective, self.parallel = module.renderer, module.objective, module.parallel
        self.data = data
        self._costs: StepCosts | None = None
        self._failed = False

    def share(self, batches: Sequence[BatchSize], device: torch.device, seconds: float) -> float | None:
        """Return the share of a device's peak that batches took in so many seconds; None where no peak is known."""
        peak = peak_flops(device)
        if peak is None or self._failed:
            return None
        if self._costs is None:
            try:
                with torch.enable_grad():
                    parts = self.lrm, self.renderer, self.objective, self.parallel
                    shape = StepShape(1, 1, 64, self._hits(), gpu=gpu_properties(device))
                    self._costs = simulate_step(*parts, shape)
            # Whatever a new part of a network cannot do without numbers: the run goes on.
            except Exception as error:
                logger.warning("speed/mfu is left out: this network cannot be run without numbers: %r", error)
                self._failed = True
                return None
        start = self.objective.lpips_start_step if self.objective.lpips else None
        flops = sum(
            self._costs.model_flops(x.objects, x.pixels, lpips=start is not None and x.step >= start)
            for x in batches
        )
        return flops / seconds / peak

    def _hits(self) -> float:
        if isinstance(self.data, ShardDataModule):
            return hit_share(self.renderer.bounds, self.data.augmentation.crop, cameras_of(self.data))
        return hit_share(self.renderer.bounds, CropConfig(), default_cameras())
