"""Distribution of a training run over processes, and the cost of a step of one process."""

import dataclasses

import torch
from jsonargparse import Namespace

from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.stream import BatchPartition
from lrm_pl.kernels.device import GpuProperties
from lrm_pl.losses.perceptual import require_measurable
from lrm_pl.planning.ray_hits import hit_fraction, training_cameras
from lrm_pl.planning.simulate import StepCosts, StepShape, simulate_step
from lrm_pl.training.module import LRMModule
from lrm_pl.training.precision import DTYPES, require_supported_precision


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A training run that is distributed over processes.

    Attributes:
        module: The model, on the meta device.
        shape: Shape of the batch of one process.
        cameras: Description of the cameras that are used to compute the fraction of rays that hit the bounds.
        batch_size: Number of objects per optimizer step.
        processes: Number of processes.
        accumulate: Number of accumulated batches per optimizer step.
        steps: Number of optimizer steps of the run.
        strategy: Class path of the strategy, or the name under which the strategy is registered in Lightning.
        replicas: Number of replicas for FSDP2.
        stage: ZeRO stage for DeepSpeed. If 0, DeepSpeed is not used.
    """

    module: LRMModule
    shape: StepShape
    cameras: str
    batch_size: int
    processes: int
    accumulate: int
    steps: int
    strategy: str
    replicas: int
    stage: int

    @property
    def fused(self) -> bool:
        """Whether AdamW is fused. As in ``LRMModule.configure_optimizers``, it is fused unless dtype is float16."""
        return self.shape.dtype != torch.float16

    def optimizer_temporaries(self, costs: StepCosts) -> float:
        """Return the size in bytes of the temporary tensors that AdamW allocates in a step.

        If AdamW is not fused, the temporary tensors are as large as all trained weights on a GPU, and as large as the
        largest trained tensor on a CPU.
        """
        if self.fused:
            return 0.0
        return 4.0 * (costs.trained if self.shape.gpu else costs.largest)

    def costs(self) -> StepCosts:
        """Simulate a step of one process that holds the whole network, and return the costs of the step."""
        module = self.module
        return simulate_step(module.lrm, module.renderer, module.objective, module.parallel, self.shape)


def plan_run(
    config: Namespace, module: LRMModule, data: ShardDataModule, processes: int, gpu: GpuProperties | None
) -> RunPlan:
    """Distribute a run over processes.

    Args:
        config: Config of the run as parsed by ``lrm fit``.
        module: The model, on the meta device.
        data: The data module.
        processes: Number of processes.
        gpu: Properties of the GPU of each process. If None, the CPU of this machine is used, with the number of threads
            of this process.

    Raises:
        InputError: The batch size is not divisible by the number of processes times the number of accumulated batches,
            or a setting is out of range.
    """
    trainer = config["trainer"]
    accumulate, steps = trainer["accumulate_grad_batches"], trainer["max_steps"]
    precision = require_supported_precision(str(trainer["precision"]))
    partition = BatchPartition(data.batch_size, world=processes, accumulate=accumulate)
    if module.objective.lpips:
        require_measurable(min(crop.size for crop in data.augmentation.crops))
    crop = max(data.augmentation.crops, key=lambda crop: crop.size)
    cameras = training_cameras(data)
    shape = StepShape(
        objects=partition.local_batch_size,
        views=module.lrm.input_views + data.side_views,
        size=crop.size,
        hits=hit_fraction(module.renderer.bounds, crop, cameras),
        gpu=gpu,
        threads=1 if gpu else torch.get_num_threads(),
        dtype=DTYPES[precision],
        deterministic=bool(trainer["deterministic"]),
    )
    strategy = trainer["strategy"]
    name, options = (
        (strategy, {}) if isinstance(strategy, str) else (strategy["class_path"], strategy["init_args"])
    )
    replicas, stage = options.get("replicas", 1), options.get("stage", 0)
    return RunPlan(
        module, shape, cameras.source, data.batch_size, processes, accumulate, steps, name, replicas, stage
    )
