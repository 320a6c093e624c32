"""One process of a planned run and the cost of its step."""

import dataclasses

import torch
from jsonargparse import Namespace

from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.errors import InputError
from lrm_pl.kernels.device import GpuProperties
from lrm_pl.losses.perceptual import require_measurable
from lrm_pl.planning.hits import cameras_of, hit_share
from lrm_pl.planning.simulate import StepCosts, StepShape, simulate_step
from lrm_pl.training.module import LRMModule
from lrm_pl.training.precision import DTYPES, require_supported_precision


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, divided over processes.

    Attributes:
        module: Its model, on the meta device.
        shape: What a process computes at a time.
        cameras: Where the share of rays that hit the bounds is from.
        batch_size: Objects an optimizer step.
        processes: Processes.
        accumulate: Batches of a process an optimizer step.
        steps: Optimizer steps of the run.
        strategy: The strategy's class, or Lightning's word for one.
        replicas: Copies that FSDP2 makes.
        stage: DeepSpeed's, or 0.
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
        """Whether AdamW is fused, as ``LRMModule.configure_optimizers`` decides: but under a GradScaler."""
        return self.shape.dtype != torch.float16

    def optimizer_temporaries(self, costs: StepCosts) -> float:
        """Return the bytes of temporary tensors of AdamW's step: all at once on a GPU, tensor by tensor on a CPU."""
        if self.fused:
            return 0.0
        return 4.0 * (costs.trained if self.shape.gpu else costs.largest)

    def costs(self) -> StepCosts:
        """Simulate a step of a process that holds the whole network."""
        module = self.module
        return simulate_step(module.lrm, module.renderer, module.objective, module.parallel, self.shape)


def plan(
    config: Namespace, module: LRMModule, data: ShardDataModule, processes: int, gpu: GpuProperties | None
) -> Plan:
    """Divide a run over processes.

    Args:
        config: The run's config, as `lrm fit` parses it.
        module: Its model, on the meta device.
        data: Its data module.
        processes: All processes of the run.
        gpu: The GPU that each has; None for this machine's CPU, with as many threads as this process.

    Raises:
        InputError: The batch cannot be divided, or a setting is out of range.
    """
    trainer = config["trainer"]
    accumulate = trainer["accumulate_grad_batches"]
    precision = require_supported_precision(str(trainer["precision"]))
    if accumulate < 1 or data.batch_size < 1:
        raise InputError(
            expected="data.batch_size and trainer.accumulate_grad_batches of 1 or more",
            found=f"{data.batch_size} and {accumulate}",
        )
    parts = processes * accumulate
    if data.batch_size % parts:
        above = -(-data.batch_size // parts) * parts
        raise InputError(
            expected=f"a data.batch_size that {processes} processes x {accumulate} accumulated batches divide",
            found=data.batch_size,
            remedy=f"give --data.batch_size {above}",
        )
    if module.objective.lpips:
        require_measurable(min(crop.size for crop in data.augmentation.crops))
    crop = max(data.augmentation.crops, key=lambda crop: crop.size)
    cameras = cameras_of(data)
    shape = StepShape(
        objects=data.batch_size // parts,
        views=module.lrm.input_views + data.side_views,
        size=crop.size,
        hits=hit_share(module.renderer.bounds, crop, cameras),
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
    return Plan(
        module,
        shape,
        cameras.source,
        data.batch_size,
        processes,
        accumulate,
        trainer["max_steps"],
        name,
        replicas,
        stage,
    )
