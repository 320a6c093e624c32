"""A Lightning strategy for FSDP2 and HSDP, and checks for unsupported Lightning strategies."""

import re
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import init_device_mesh

from lrm_pl.errors import InputError
from lrm_pl.training.parallelize import mesh_shape
from lrm_pl.training.sharded_state import ProvidesStateAccess


def require_supported_strategy_name(name: str) -> None:
    """Reject the name of a Lightning strategy that this package replaces.

    With bfloat16 precision, Lightning's FSDP and DeepSpeed strategies round cameras. They also store weights and
    gradients in a form that checkpoints and the gradient guard do not support.

    Args:
        name: Value of ``trainer.strategy``, either a registered name such as "fsdp" or the name of a class.

    Raises:
        InputError: The strategy is not supported.
    """
    module, _, short = name.rpartition(".")
    match = re.match(r"(fsdp|deepspeed|zero)2?(?:strategy|_stage_(\d)|_|$)", short.lower())
    if match is not None and module.partition(".")[0] in ("", "lightning", "pytorch_lightning"):
        config = "fsdp2" if match[1] == "fsdp" else f"deepspeed_{match[2] or 2}"
        raise InputError(
            expected="a strategy that supports checkpoints and the gradient guard",
            found=name,
            remedy=f"use -c configs/trainer/{config}.yaml",
        )
    if (method := re.match(r"ddp_(spawn|fork|notebook)", name)) is not None:
        require_supported_start_method(method[1])


def require_supported_start_method(method: str | None) -> None:
    """Reject start methods that fork or spawn processes, which would end before the report of the run is written.

    Args:
        method: ``start_method`` of a DDP strategy. If None, the default start method is used.

    Raises:
        InputError: The start method is not supported.
    """
    if method not in (None, "popen"):
        raise InputError(
            expected="start_method popen",
            found=f"{method}, whose processes end before the report is written",
            remedy="omit start_method, or use -c configs/trainer/ddp.yaml",
        )


def require_supported_strategy(strategy: Strategy) -> None:
    """Reject a Lightning strategy that this package replaces.

    Raises:
        InputError: The strategy is not supported.
    """
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy) and not isinstance(
        strategy, ProvidesStateAccess
    ):
        base = FSDPStrategy if isinstance(strategy, FSDPStrategy) else DeepSpeedStrategy
        require_supported_strategy_name(base.__name__)


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2), in which each rank stores a shard of the training state.

    The training state consists of parameters, gradients and optimizer state. The strategy creates the device mesh, and
    ``lrm_pl.training.parallelize.shard`` shards the network. The strategy supports GPUs, and CPUs for tests.

    Args:
        replicas: Number of replicas of the training state (HSDP). Each replica is sharded over the number of processes
            divided by ``replicas``. With one replica per node, weights are gathered only within nodes.
        process_group_backend: Backend of the process group. If None, NCCL on GPUs and gloo on CPUs.
        timeout_s: Timeout of collectives in seconds.
    """

    def __init__(
        self, replicas: int = 1, process_group_backend: str | None = None, timeout_s: float = 1800.0
    ) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout_s),
        )
        self.replicas = replicas

    def setup_environment(self) -> None:
        """Initialize the process group and the device mesh.

        Raises:
            InputError: The number of processes is not a multiple of the number of replicas.
        """
        self._setup_distributed()
        if self.replicas < 1 or self.world_size % self.replicas:
            raise InputError(
                expected=f"a number of replicas that divides the number of processes, {self.world_size}",
                found=self.replicas,
                remedy="use one replica per node with --trainer.strategy.init_args.replicas NODES",
            )
        shape, names = mesh_shape(self.world_size, self.replicas)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Number of data-parallel processes and the rank of this process."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def _determine_device_ids(self) -> list[int]:
        assert isinstance(self.root_device, torch.device)
        return [self.root_device.index]
