"""AdamW without decay where it does not belong, and a warm-up + cosine schedule that fits the run's length.

The learning rate is a pure function of the step and the run's length, so it has no state to save, and a run that is
resumed with another length follows the new one.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lrm_pl.errors import InputError
from lrm_pl.models.lrm import LRM
from lrm_pl.training.parallelize import network_blocks


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (LRM, section 4.2).

    Attributes:
        lr: Peak learning rate.
        betas: Decay of the moment estimates.
        weight_decay: Decoupled decay of matrices and kernels; none on norms, biases and embeddings.
        warmup: Fraction of the run's steps spent warming up. A share and not a number, so that a short run leaves
            its warm-up; the paper's 3000 steps are 0.07 of its run.
        final_lr: Learning rate at the end, as a share of the peak.
        layer_decay: For fine-tuning: a block learns at this share of the rate of the block behind it, through
            transformer and encoder to the image; what follows the last block learns at the full rate (BEiT, A.2).
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: float = 0.07
    final_lr: float = 0.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        rules = {
            "lr of at least 0": self.lr >= 0,
            "betas in [0, 1)": all(0 <= beta < 1 for beta in self.betas),
            "weight_decay of at least 0": self.weight_decay >= 0,
            "warmup, a share of the run's steps, in [0, 1]": 0 <= self.warmup <= 1,
            "final_lr, a share of lr, in [0, 1]": 0 <= self.final_lr <= 1,
            "layer_decay in (0, 1]": 0 < self.layer_decay <= 1,
        }
        for rule, kept in rules.items():
            if not kept:  # NaN keeps none
                name = rule.replace(",", " ").split()[0]
                raise InputError(
                    expected=f"model.optimizer.{rule}",
                    found=getattr(self, name),
                    remedy=f"correct --model.optimizer.{name}",
                )

    def build(self, model: LRM, *, fused: bool = True) -> torch.optim.AdamW:
        """Make the optimizer; each group's share of the learning rate is its ``share``.

        Args:
            model: Whose parameters.
            fused: One kernel per step, which can skip a step on the device (``found_inf``).
        """
        groups = parameter_groups(model, self.weight_decay, layer_shares(model, self.layer_decay))
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=fused)

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of optimizer step ``step`` of ``steps``, counted from 0."""
        return self.lr * warmup_cosine(step, steps, self.warmup, self.final_lr)


def warmup_cosine(step: int, steps: int, warmup: float, final: float) -> float:
    """Return the factor on the peak learning rate for optimizer step ``step`` of ``steps``, counted from 0."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def layer_shares(lrm: LRM, decay: float) -> dict[int, float]:
    """Compute the share of the learning rate of every parameter in or before a block, by the parameter's id."""
    blocks = network_blocks(lrm)
    shares = {
        id(p): decay ** (len(blocks) - number)
        for number, block in enumerate(blocks)
        for p in block.parameters()
    }
    encoder_blocks = len(blocks) - len(lrm.transformer.blocks)
    # What a block is fed with learns as slowly as one more block in its place.
    entries = [
        lrm.transformer.tokens,
        *(p for m in (lrm.camera_embedder, lrm.view_norm) if m for p in m.parameters()),
    ]
    for parameters, number in ((lrm.encoder.parameters(), 0), (entries, encoder_blocks)):
        for parameter in parameters:
            shares.setdefault(id(parameter), decay ** (len(blocks) - number + 1))
    return shares


def parameter_groups(
    model: nn.Module, weight_decay: float, shares: Mapping[int, float] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Split trainable parameters by whether they decay (weights of linear and convolution layers), and by share.

    Args:
        model: Whose parameters.
        weight_decay: Of those that decay.
        shares: Fraction of the learning rate by the parameter's id; 1 where none is named.
    """
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for share in sorted({shares.get(id(p), 1.0) for p in trainable}):
        members = [p for p in trainable if shares.get(id(p), 1.0) == share]
        for decays in (True, False):
            chosen = [p for p in members if (id(p) in decayed) is decays]
            groups.append({"params": chosen, "weight_decay": weight_decay if decays else 0.0, "share": share})
    return [group for group in groups if group["params"]]
