"""Exchange of Python objects and errors between ranks."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import lightning as L
import torch

from lrm_pl.errors import InputError

T = TypeVar("T")


@contextlib.contextmanager
def raise_on_all_ranks(trainer: L.Trainer) -> Iterator[None]:
    """Return a context that re-raises an ``InputError`` or ``OSError`` of rank 0 as an ``InputError`` on all ranks."""
    message = None
    try:
        yield
    except (InputError, OSError) as error:
        message = str(error)
    message = trainer.strategy.broadcast(message)
    if message is not None:
        raise InputError(message)


def gather_objects(value: T, group: torch.distributed.ProcessGroup | None = None) -> list[T]:
    """Gather one object per rank and return them in rank order. All ranks of the group must call this together."""
    if not torch.distributed.is_initialized():
        return [value]
    values = [value] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values
