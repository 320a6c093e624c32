"""FSDP2 with or without replicas as a Lightning strategy, and which of Lightning's own are refused."""

import re
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import init_device_mesh

from lrm_pl.errors import InputError
from lrm_pl.training.parallelize import mesh_layout
from lrm_pl.training.sharded_state import MakesHolder


def require_supported_name(name: str) -> None:
    """Refuse the name or class of a strategy of Lightning that this package replaces by its own.

    Lightning's FSDP and DeepSpeed round cameras to bf16 and hold weights and gradients in ways of their own, which
    neither checkpoints nor the gradient guard read.

    Args:
        name: As in ``trainer.strategy``: a registered name (``fsdp``) or a class.

    Raises:
        InputError: It is one of these; the message names the config file to use.
    """
    given = name.rpartition(".")[2].lower()
    if name.lower() in ("fsdp2strategy", "zerostrategy"):
        config = "fsdp2" if name[0] in "fF" else "deepspeed_2"
        raise InputError(
            expected="the name of a strategy of Lightning",
            found=f"the class {name}",
            remedy=f"-c configs/trainer/{config}.yaml",
        )
    found = re.match(r"(fsdp|deepspeed)(?:strategy|_stage_(\d)|_|$)", given)
    if found is not None:
        config = "fsdp2" if found[1] == "fsdp" else f"deepspeed_{found[2] or 2}"
        raise InputError(
            expected="a strategy whose weights and gradients can be checkpointed and checked",
            found=f"Lightning's own {name}",
            remedy=f"use this package's instead: -c configs/trainer/{config}.yaml",
        )
    if (start := re.match(r"ddp_(spawn|fork|notebook)", name)) is not None:
        require_supported_start(start[1])


def require_supported_start(method: str | None) -> None:
    """Refuse processes that are started from a running program: what they reach stays with them when they end.

    Args:
        method: ``start_method`` of a DDP strategy; None: the usual way.

    Raises:
        InputError: It is one of these.
    """
    if method not in (None, "popen"):
        raise InputError(
            expected="processes that run the whole command",
            found=f"start_method {method}, whose processes end before the report, with what it needs",
            remedy="leave it out: -c configs/trainer/ddp.yaml",
        )


def require_supported(strategy: Strategy) -> None:
    """Refuse a strategy of Lightning that this package replaces by its own.

    Raises:
        InputError: It is one of these; the message names the config file to use.
    """
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy) and not isinstance(strategy, MakesHolder):
        base = FSDPStrategy if isinstance(strategy, FSDPStrategy) else DeepSpeedStrategy
        require_supported_name(base.__name__)


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2): every rank holds a part of parameters, gradients and optimizer state.

    ``training.parallel.shard`` cuts the network; this makes the mesh of processes. It runs on GPUs (NCCL) and, to be
    tried out, on CPUs (gloo).

    Args:
        replicas: 1 shards over all processes. More makes so many copies, each sharded over world / replicas processes
            (HSDP): with one copy a node, weights are gathered inside nodes only.
        process_group_backend: NCCL on GPUs, gloo on CPUs unless said otherwise.
        timeout_s: Seconds until a rank that does not answer ends the run.
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
        """Start the process group and lay the processes out as a mesh.

        Raises:
            InputError: The replicas do not divide the processes.
        """
        self._setup_distributed()
        if self.replicas < 1 or self.world_size % self.replicas:
            raise InputError(
                expected=f"replicas that divide the {self.world_size} processes",
                found=self.replicas,
                remedy="one a node is usual: --trainer.strategy.init_args.replicas NODES",
            )
        shape, names = mesh_layout(self.world_size, self.replicas)
        self._device_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Say how data are divided: all ranks are data parallel."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def _determine_device_ids(self) -> list[int]:
        assert isinstance(self.root_device, torch.device)
        return [self.root_device.index]
