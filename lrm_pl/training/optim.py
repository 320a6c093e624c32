"""AdamW without weight decay for norms, biases and embeddings, and a schedule with linear warm-up and cosine decay.

The learning rate is a function of the step and the length of the run. The schedule has no state, so a run that is
resumed with a different length follows the new schedule.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from lrm_pl.models.lrm import LRM
from lrm_pl.training.parallelize import network_blocks
from lrm_pl.training.supported import require_rules


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (LRM, section 4.2).

    Attributes:
        lr: Peak learning rate.
        betas: Decay rates of the moment estimates.
        weight_decay: Weight decay of linear and convolution weights. It does not apply to norms, biases and embeddings.
        warmup: Number of warm-up steps as a fraction of all steps. The paper uses 3000 steps, a fraction of 0.07.
        final_lr: Learning rate at the end of the run as a fraction of the peak learning rate.
        layer_decay: Ratio of the learning rates of consecutive blocks for fine-tuning (BEiT, A.2). Each block has
            ``layer_decay`` times the learning rate of the next block, from the last transformer block to the first
            encoder block.
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: float = 0.07
    final_lr: float = 0.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        """Check that the values are in the supported ranges."""
        rules = {
            "lr of at least 0": self.lr >= 0,
            "betas in [0, 1)": all(0 <= beta < 1 for beta in self.betas),
            "weight_decay of at least 0": self.weight_decay >= 0,
            "warmup, a fraction of all steps, in [0, 1]": 0 <= self.warmup <= 1,
            "final_lr, a fraction of lr, in [0, 1]": 0 <= self.final_lr <= 1,
            "layer_decay in (0, 1]": 0 < self.layer_decay <= 1,
        }
        require_rules(self, "model.optimizer", rules)  # NaN meets no rule

    def build(self, model: LRM, *, fused: bool = True) -> torch.optim.AdamW:
        """Create the optimizer. ``LRMModule`` multiplies the learning rate of a parameter group by its ``lr_scale``.

        Args:
            model: The network to optimize.
            fused: Whether to use the fused implementation, which can skip a step on the device (``found_inf``).
        """
        groups = parameter_groups(model, self.weight_decay, layer_lr_scales(model, self.layer_decay))
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=fused)

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of an optimizer step.

        Args:
            step: Index of the optimizer step, starting at 0.
            steps: Number of optimizer steps of the run.
        """
        return self.lr * warmup_cosine(step, steps, self.warmup, self.final_lr)


def warmup_cosine(step: int, steps: int, warmup: float, final: float) -> float:
    """Return the ratio of the learning rate of an optimizer step to the peak learning rate.

    Args:
        step: Index of the optimizer step, starting at 0.
        steps: Number of optimizer steps of the run.
        warmup: Number of warm-up steps as a fraction of all steps.
        final: Value of the ratio at the end of the run.
    """
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def layer_lr_scales(lrm: LRM, decay: float) -> dict[int, float]:
    """Return a mapping from the ``id`` of a parameter to its learning rate scale for layer-wise decay."""
    blocks = network_blocks(lrm)
    scales = {
        id(p): decay ** (len(blocks) - number)
        for number, block in enumerate(blocks)
        for p in block.parameters()
    }
    encoder_blocks = len(blocks) - len(lrm.transformer.blocks)
    # Modules that compute the inputs of a stage count as a block before the first block of the stage.
    inputs = [
        lrm.transformer.tokens,
        *(p for m in (lrm.camera_embedder, lrm.view_norm) if m for p in m.parameters()),
    ]
    for parameters, number in ((lrm.encoder.parameters(), 0), (inputs, encoder_blocks)):
        for parameter in parameters:
            scales.setdefault(id(parameter), decay ** (len(blocks) - number + 1))
    return scales


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scales: Mapping[int, float] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Group trainable parameters by learning rate and weight decay.

    Args:
        model: The module to optimize.
        weight_decay: Weight decay of linear and convolution weights.
        lr_scales: Mapping from the ``id`` of a parameter to its learning rate scale. The default scale is 1.
    """
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = lr_scales.get(id(parameter), 1.0), id(parameter) not in decayed
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[scale, exempt], "weight_decay": 0.0 if exempt else weight_decay, "lr_scale": scale}
        for scale, exempt in sorted(groups)
    ]
