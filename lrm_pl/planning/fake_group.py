"""A process of a large run, without the others: PyTorch's fake process group, whose messages go nowhere."""

import contextlib
from collections.abc import Iterator

import torch.distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lrm_pl.training.parallelize import mesh_shape


@contextlib.contextmanager
def as_rank(rank: int, processes: int, copies: int = 1) -> Iterator[DeviceMesh]:
    """Be one rank of a run, laid out as ``FSDP2Strategy`` lays it out.

    Args:
        rank: Which.
        processes: All of them.
        copies: Copies of the network, each cut over processes / copies of them.
    """
    # Private, and what PyTorch's own tools of this kind are built on; importing it registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        shape, names = mesh_shape(processes, copies)
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        torch.distributed.destroy_process_group()
