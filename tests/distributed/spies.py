"""Callbacks that inspect a distributed run or inject faults on every rank."""

import lightning as L
import torch

from lrm_pl.models import camera_embedder, decoder
from lrm_pl.rendering import ray_marching, renderer


class PrecisionSpy(L.Callback):
    """Raise if poses, rays, t or compositing are not float32; log the dtypes of the network."""

    #: Functions whose tensors are float32 whatever the precision.
    EXACT = (
        (renderer, "pixel_rays"), (renderer, "ray_interval"),
        (ray_marching, "sample_stratified"), (ray_marching, "composite"),
        (camera_embedder, "camera_vector"),
    )  # fmt: skip

    def __init__(self):
        self.seen = {}

    def setup(self, trainer, pl_module, stage):
        for module, name in self.EXACT:
            self._spy(module, name)
        pl_module.lrm.transformer.blocks[0].mlp.register_forward_hook(
            lambda _, inputs, output: self._note("products", [output])
        )
        decode = decoder.NeRFDecoder.decode

        def noted(this, features, weights):
            density, color = decode(this, features, weights)
            self._note("density", [density, color])
            return density, color

        decoder.NeRFDecoder.decode = noted

    def on_train_end(self, trainer, pl_module):
        exact = {name for _, name in self.EXACT} | {"density"}
        assert self.seen.keys() == exact | {"products"}, self.seen
        assert set().union(*(self.seen[name] for name in exact)) == {torch.float32}, self.seen
        assert {p.dtype for p in pl_module.lrm.parameters()} == {torch.float32}
        print(f"rank {trainer.global_rank} is exact; products in {self.seen['products']}")

    def _spy(self, module, name):
        original = getattr(module, name)

        def wrapper(*args, **options):
            found = original(*args, **options)
            self._note(name, [*args, *(found if isinstance(found, tuple) else [found])])
            return found

        setattr(module, name, wrapper)

    def _note(self, name, values):
        self.seen.setdefault(name, set()).update(v.dtype for v in values if isinstance(v, torch.Tensor))


class Spoiler(L.Callback):
    """Set the images of one batch of one rank to NaN.

    Args:
        step: Of this step.
        rank: On this rank.
    """

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            batch.target.images.fill_(torch.nan)
