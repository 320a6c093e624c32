"""Checkpoints of tiny runs, and comparisons of their tensors."""

import torch

from lrm_pl.checkpoints.tensors import read_tensors, tensor_specs

AVERAGE = {"class_path": "lrm_pl.training.ema.WeightAverage", "init_args": {"decay": 0.5}}


def keeper(**options):
    options = {"every": 2, "keep": 2, "monitor": None, **options}
    return {"class_path": "lrm_pl.training.checkpointing.CheckpointAndResume", "init_args": options}


def read(checkpoint):
    into = {name: torch.empty_like(spec, device="cpu") for name, spec in tensor_specs(checkpoint).items()}
    read_tensors(checkpoint, into)
    return into


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
