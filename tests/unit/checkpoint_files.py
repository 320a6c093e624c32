"""Small checkpoints, and damage to them."""

import os

import torch

from lrm_pl.checkpoints.index import checkpoint_path, checkpoint_step, finalize_checkpoint, list_checkpoints
from lrm_pl.checkpoints.tensors import write_tensors


def some_tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    floats = torch.randn(5, 7, generator=generator)
    return {
        "network.a.weight": floats,
        "network.a.bias": torch.randn(7, generator=generator).bfloat16(),
        "network.numbers": torch.arange(12).reshape(3, 4),
        "network.column": torch.randn(4, 6, generator=generator)[:, 2],  # not contiguous
        "network.empty": torch.empty(0, 3),
        "adam.a.weight.step": torch.tensor(float(seed)),
    }


def write(folder, step, tensors=None, run=None):
    path = checkpoint_path(str(folder), step)
    files = write_tensors(path, some_tensors(step) if tensors is None else tensors)
    return finalize_checkpoint(path, step, {"position": step} if run is None else run, files)


def largest(path):
    return max((path / name for name in os.listdir(path) if name != "index.json"), key=os.path.getsize)


def flipped(path):
    content = bytearray(largest(path).read_bytes())
    content[len(content) // 2] ^= 1
    largest(path).write_bytes(content)


def steps(folder):
    return sorted(checkpoint_step(path) for path in list_checkpoints(str(folder)))
