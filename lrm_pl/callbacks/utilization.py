"""Model FLOPs utilization (MFU), the fraction of the peak FLOP/s of a device that training reaches."""

import dataclasses
import logging
from collections.abc import Sequence

import lightning as L
import torch

from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.transforms import CropConfig
from lrm_pl.kernels.device import gpu_properties
from lrm_pl.planning.gpus import peak_flops
from lrm_pl.planning.ray_hits import default_cameras, hit_fraction, training_cameras
from lrm_pl.planning.simulate import StepCosts, StepShape, copy_to, simulate_step
from lrm_pl.training.module import LRMModule

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BatchSize:
    """Size of the batch in one forward and backward pass of a process.

    Attributes:
        objects: Number of objects.
        pixels: Number of target pixels of all objects.
        step: Number of optimizer steps completed before the pass.
    """

    objects: int
    pixels: int
    step: int


class UtilizationMeter:
    """Meter of the model FLOPs utilization, based on a simulated step.

    The step is simulated when ``utilization`` is first called.

    Args:
        module: Training module before sharding. Only the shapes of the network are kept.
        data: Training data, whose cameras and crops determine the fraction of rays that intersect the scene bounds. If
            None, default cameras are used.
    """

    def __init__(self, module: LRMModule, data: L.LightningDataModule | None = None) -> None:
        self.lrm = copy_to("meta", module.lrm)
        self.renderer, self.objective, self.parallel = module.renderer, module.objective, module.parallel
        self.data = data
        self._costs: StepCosts | None = None
        self._failed = False

    def utilization(self, batches: Sequence[BatchSize], device: torch.device, seconds: float) -> float | None:
        """Return the fraction of the peak FLOP/s of a device that training reached.

        Args:
            batches: Processed batches.
            device: Device that processed the batches.
            seconds: Duration of the processing.

        Returns:
            The fraction, or None if the peak of the device is unknown or the network cannot be simulated.
        """
        peak = peak_flops(device)
        if peak is None or self._failed:
            return None
        if self._costs is None:
            try:
                with torch.enable_grad():
                    shape = StepShape(1, 1, 64, self._hit_fraction(), gpu=gpu_properties(device))
                    self._costs = simulate_step(self.lrm, self.renderer, self.objective, self.parallel, shape)
            # A custom network may not support fake tensors. Training then continues without this metric.
            except Exception as error:
                logger.warning(
                    "speed/mfu is not logged, because the network cannot run on fake tensors: %r", error
                )
                self._failed = True
                return None
        start = self.objective.lpips_start_step if self.objective.lpips else None
        flops = sum(
            self._costs.model_flops_of(x.objects, x.pixels, lpips=start is not None and x.step >= start)
            for x in batches
        )
        return flops / seconds / peak

    def _hit_fraction(self) -> float:
        if isinstance(self.data, ShardDataModule):
            return hit_fraction(
                self.renderer.bounds, self.data.augmentation.crop, training_cameras(self.data)
            )
        return hit_fraction(self.renderer.bounds, CropConfig(), default_cameras())
