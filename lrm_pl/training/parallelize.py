"""Activation checkpointing, compilation of blocks, and sharding of the network.

These transformations are applied in this order, so that each checkpointed block is compiled and sharded as one unit.
They do not rename parameters, so checkpoints do not depend on them.
"""

import dataclasses
import functools

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import collective_device
from lrm_pl.models.lrm import LRM


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Settings for activation checkpointing and compilation of blocks.

    Attributes:
        activation_checkpointing_every: Interval between blocks whose activations are checkpointed. With 1, all blocks
            are checkpointed. With 0, no block is checkpointed.
        recompute_mlp: Whether to checkpoint the activations of the MLPs of transformer blocks. This reduces memory
            usage by a third and increases the time per step by 5%.
        compile: Whether to compile each block with ``torch.compile``. The first step then takes minutes, and later
            steps are faster.
    """

    activation_checkpointing_every: int = 0
    recompute_mlp: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        """Check that the values are in the supported ranges."""
        if self.activation_checkpointing_every < 0:
            raise InputError(
                expected="activation_checkpointing_every of 0 or more",
                found=self.activation_checkpointing_every,
            )


def network_blocks(lrm: LRM) -> list[nn.Module]:
    """Return the blocks of the encoder and of the transformer, in the order in which they run."""
    return [*lrm.encoder.vit.blocks, *lrm.transformer.blocks]


def prepare_blocks(lrm: LRM, config: ParallelConfig) -> None:
    """Apply activation checkpointing and compilation to the blocks of a network, in place."""
    if config.recompute_mlp:
        for block in lrm.transformer.blocks:
            _checkpoint_method(block, "mlp_step")  # recomputation stops before the last layer
    for number, block in enumerate(network_blocks(lrm), start=1):
        trained = any(p.requires_grad for p in block.parameters())
        every = config.activation_checkpointing_every
        if every and number % every == 0 and trained:
            _checkpoint_method(block, "forward")
        if config.compile:
            block.compile()


def _checkpoint_method(module: nn.Module, method: str) -> None:
    """Apply activation checkpointing to a method of a module."""
    setattr(module, method, functools.partial(checkpoint, getattr(module, method), use_reentrant=False))


def mesh_shape(processes: int, replicas: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the shape and dimension names of a device mesh for FSDP, or for HSDP if there are several replicas."""
    if replicas == 1:
        return (processes,), ("shard",)
    return (replicas, processes // replicas), ("replicate", "shard")


def shard(lrm: LRM, mesh: DeviceMesh, block_dtype: torch.dtype | None) -> None:
    """Shard parameters over a mesh with FSDP2, in place.

    Each block is one FSDP parameter group, and the other modules together are one group. Gradients are reduced in
    float32.

    Args:
        lrm: The network, with equal weights on all ranks.
        mesh: A 1-D mesh to shard over, or a 2-D mesh to replicate over the first dimension and shard over the second.
        block_dtype: Data type in which blocks are gathered and computed. If None, float32. Norms and modules outside
            of blocks are always computed in float32.
    """
    # FSDP's cast of inputs would round poses and intrinsics. Autocast casts selectively.
    policy = MixedPrecisionPolicy(
        param_dtype=block_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in network_blocks(lrm):
        norms: list[nn.Module] = [
            module for module in block.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)
        ]
        if block_dtype is not None and norms:
            # The inputs of norms are float32, and the CPU kernel requires weights of the same dtype.
            fully_shard(norms, mesh=mesh, mp_policy=exact)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    shards = mesh.size(mesh.ndim - 1)
    fully_shard(lrm, mesh=mesh, mp_policy=exact, shard_placement_fn=lambda p: _placement(p, shards))


def _placement(parameter: nn.Parameter, shards: int) -> Shard | None:
    """Return the placement of a parameter, or None for the default placement (sharding along dimension 0).

    Parameters of shape (1, N, D), such as tokens and embeddings, are sharded along N or D to avoid padding.
    """
    if parameter.shape[0] >= shards:
        return None
    return next((Shard(d) for d, size in enumerate(parameter.shape) if size % shards == 0), None)


def require_equal_weights(module: nn.Module) -> None:
    """Check that all ranks start from equal weights. Sharding would otherwise combine weights of different ranks.

    Raises:
        InputError: The weights differ between ranks.
    """
    if not torch.distributed.is_initialized():
        return
    sums = torch.stack([p.detach().double().sum() for p in module.parameters()])
    bounds = torch.stack([sums, -sums]).to(collective_device())
    torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)
    if not torch.equal(bounds[0], -bounds[1]):
        raise InputError(
            expected="equal initial weights on all ranks",
            found="different weights",
            remedy="use the same seed (--seed_everything 0) and the same weight files on all ranks",
        )
