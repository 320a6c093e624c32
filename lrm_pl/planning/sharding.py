"""Simulation of sharding in a single process, with PyTorch's fake process group, which does not communicate."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lrm_pl.errors import InputError
from lrm_pl.models.lrm import LRM
from lrm_pl.planning.simulate import copy_to
from lrm_pl.training.parallelize import mesh_shape, shard


@contextlib.contextmanager
def fake_process_group(rank: int, processes: int, replicas: int = 1) -> Iterator[DeviceMesh]:
    """Initialize a fake process group, and yield a device mesh with the shape that ``FSDP2Strategy`` uses.

    Args:
        rank: Rank of this process.
        processes: World size.
        replicas: Number of replicas of the network. Each replica is sharded over ``processes / replicas`` ranks.
    """
    # This module of PyTorch is private. The import registers the backend "fake".
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        shape, names = mesh_shape(processes, replicas)
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        torch.distributed.destroy_process_group()


def check_shards(lrm: LRM, processes: int, replicas: int, dtype: torch.dtype, ranks: Iterable[int]) -> None:
    """Shard a network for each of the given ranks, and check the shape of every local shard.

    A weight is split along one dimension into shards of equal size. If the size of the dimension is not divisible by
    the number of shards, the last shards are smaller or empty.

    Args:
        lrm: The network, which is copied. It should be on the meta device to save memory.
        processes: World size.
        replicas: Number of replicas of the network.
        dtype: Data type in which the blocks compute.
        ranks: Ranks to check.

    Raises:
        InputError: A shard does not have the expected shape.
    """
    shards = processes // replicas
    for rank in ranks:
        with (
            fake_process_group(rank, processes, replicas) as mesh,
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            network = copy_to("cpu", lrm)
            shard(network, mesh, None if dtype == torch.float32 else dtype)
            for name, parameter in network.named_parameters():
                assert isinstance(parameter, DTensor), name
                placement = parameter.placements[-1]
                assert isinstance(placement, Shard), (name, placement)
                rows, expected = parameter.shape[placement.dim], list(parameter.shape)
                size = -(-rows // shards)
                expected[placement.dim] = len(range(rows)[rank % shards * size :][:size])
                found = list(parameter.to_local().shape)
                if found != expected:
                    shape = list(parameter.shape)
                    raise InputError(
                        subject=name,
                        expected=f"a shard of shape {expected} on rank {rank} for a weight of shape {shape}",
                        found=found,
                    )
