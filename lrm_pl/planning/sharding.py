"""Check how a network is cut, before there are GPUs: every process's part, by its own program."""

from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Shard

from lrm_pl.errors import InputError
from lrm_pl.models.lrm import LRM
from lrm_pl.planning.fake_group import as_rank
from lrm_pl.planning.simulate import fake_copy
from lrm_pl.training.parallelize import shard


def check_shards(lrm: LRM, processes: int, copies: int, dtype: torch.dtype, ranks: Iterable[int]) -> None:
    """Shard a network as each of some ranks would, and compare what it holds with what it should.

    A weight is cut along one dimension into parts of equal size, the last ones smaller or empty.

    Args:
        lrm: The network; best on the meta device, and not touched.
        processes: All processes.
        copies: Copies of the network.
        dtype: What blocks compute in.
        ranks: Which processes.

    Raises:
        InputError: A weight is not cut so.
    """
    parts = processes // copies
    for rank in ranks:
        with as_rank(rank, processes, copies) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
            network = fake_copy(lrm)
            shard(network, mesh, None if dtype == torch.float32 else dtype)
            for name, parameter in network.named_parameters():
                assert isinstance(parameter, DTensor), name
                placement = parameter.placements[-1]
                assert isinstance(placement, Shard), (name, placement)
                rows, expected = parameter.shape[placement.dim], list(parameter.shape)
                size = -(-rows // parts)
                first = min(rows, rank % parts * size)
                expected[placement.dim] = min(rows, first + size) - first
                found = list(parameter.to_local().shape)
                if found != expected:
                    raise InputError(
                        subject=name,
                        expected=f"rank {rank} to hold {expected} of {tuple(parameter.shape)}",
                        found=found,
                    )
