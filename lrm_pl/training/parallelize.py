"""What is done to the network from outside before it trains: recomputed activations, compiled blocks, shards.

In this order: recomputation is compiled with its block, and a block is sharded as a whole. Nothing here changes a
parameter's name, so a checkpoint does not depend on it.
"""

import dataclasses
import functools

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import collective_device
from lrm_pl.models.lrm import LRM


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How blocks are run.

    Attributes:
        activation_checkpointing_every: Checkpoint the activations of every n-th block (1: all, 0: none): backward
            recomputes them.
        recompute_mlp: The MLP of a transformer block keeps only its input, and computes the hidden layer again in
            backward: a third less memory for a twentieth more time.
        compile: Compile each block with ``torch.compile``: the first step takes minutes, later ones less.
    """

    activation_checkpointing_every: int = 0
    recompute_mlp: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.activation_checkpointing_every < 0:
            raise InputError(
                expected="activation_checkpointing_every of 0 or more",
                found=self.activation_checkpointing_every,
            )


def network_blocks(lrm: LRM) -> list[nn.Module]:
    """List the blocks of the encoder and of the transformer, in the order in which they run."""
    return [*lrm.encoder.vit.blocks, *lrm.transformer.blocks]


def prepare_blocks(lrm: LRM, config: ParallelConfig) -> None:
    """Make blocks recompute, then compile them, in place."""
    if config.recompute_mlp:
        for block in lrm.transformer.blocks:
            # It stops before the last product, whose result nothing needs.
            _recompute(block, "mlp_step")
    for number, block in enumerate(network_blocks(lrm), start=1):
        trained = any(p.requires_grad for p in block.parameters())
        if (
            config.activation_checkpointing_every
            and number % config.activation_checkpointing_every == 0
            and trained
        ):
            _recompute(block, "forward")
        if config.compile:
            block.compile()


def _recompute(module: nn.Module, method: str) -> None:
    """Make a method of a module keep only its inputs for backward."""
    setattr(module, method, functools.partial(checkpoint, getattr(module, method), use_reentrant=False))


def mesh_layout(processes: int, copies: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return shape and names of the mesh that shards over all processes, or makes copies and shards each (HSDP)."""
    return ((processes,), ("shard",)) if copies == 1 else ((copies, processes // copies), ("copy", "shard"))


def shard(lrm: LRM, mesh: DeviceMesh, block_dtype: torch.dtype | None) -> None:
    """Shard parameters over a mesh with FSDP2, in place: every block on its own, the small modules as one group.

    Args:
        lrm: The network, with equal weights on all ranks.
        mesh: One dimension shards over all ranks; two replicate over the first and shard over the second (HSDP).
        block_dtype: What blocks compute in and are gathered in; their gradients are reduced in float32. None, and
            the small modules (camera embedder, decoder, norms, tokens) always: float32.
    """
    # FSDP's own cast would round poses and intrinsics; autocast casts what may be cast.
    policy = MixedPrecisionPolicy(
        param_dtype=block_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in network_blocks(lrm):
        norms: list[nn.Module] = [
            module for module in block.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)
        ]
        if block_dtype is not None and norms:
            # A group of their own: what they norm is float32, and a CPU refuses weights of another type.
            fully_shard(norms, mesh=mesh, mp_policy=exact)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    shards = mesh.size(mesh.ndim - 1)
    fully_shard(lrm, mesh=mesh, mp_policy=exact, shard_placement_fn=lambda p: _placement(p, shards))


def _placement(parameter: nn.Parameter, shards: int) -> Shard | None:
    """Cut tokens and embeddings, (1, N, D), along N or D: FSDP2 would pad their first dimension to a row a rank."""
    if parameter.shape[0] >= shards:
        return None
    return next((Shard(d) for d, size in enumerate(parameter.shape) if size % shards == 0), None)


def require_equal_weights(module: nn.Module) -> None:
    """Refuse ranks that start from different weights, which sharding would mix.

    Raises:
        InputError: They differ.
    """
    if not torch.distributed.is_initialized():
        return
    # A sum a parameter, on the device that the process group speaks.
    sums = torch.stack([p.detach().double().sum() for p in module.parameters()])
    bounds = torch.stack([sums, -sums]).to(collective_device())
    torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX)
    if not torch.equal(bounds[0], -bounds[1]):
        raise InputError(
            expected="the same initial weights on all ranks",
            found="different ones",
            remedy="give one seed to all of them (--seed_everything 0) and the same weights files",
        )


@dataclasses.dataclass(frozen=True)
class Part:
    """What a rank holds of a tensor that is cut like a line of numbers, as ZeRO cuts.

    Attributes:
        local: The numbers from ``start`` on of the flattened tensor; may be none.
        start: Where they begin.
        shape: Shape of the whole.
    """

    local: Tensor
    start: int
    shape: torch.Size

    def whole(self) -> Tensor:
        """Return the whole tensor; all ranks must call this."""
        flat = self.local.new_zeros(self.shape.numel())
        flat[self.start : self.start + len(self.local)] = self.local
        torch.distributed.all_reduce(flat)
        return flat.view(self.shape)

    def fill(self, value: Tensor) -> None:
        """Take this rank's numbers from a whole tensor."""
        self.local.copy_(value.flatten()[self.start : self.start + len(self.local)])


def whole(tensor: Tensor | Part) -> Tensor:
    """Return a tensor that may be in shards or parts as an ordinary one; all ranks must call this."""
    if isinstance(tensor, Part):
        return tensor.whole()
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor
