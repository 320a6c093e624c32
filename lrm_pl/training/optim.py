"""AdamW without decay where it does not belong, and a warm-up + cosine schedule that fits the run's length.

The learning rate is a pure function of the step and the run's length, so it has no state to save, and a run that is
resumed with another length follows the new one.
"""

import dataclasses
import math

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (LRM, section 4.2).

    Attributes:
        lr: Peak learning rate.
        betas: Decay of the moment estimates.
        weight_decay: Decoupled decay of matrices and kernels; none on norms, biases and embeddings.
        warmup: Share of the run's steps spent warming up. A share and not a number, so that a short run leaves
            its warm-up; the paper's 3000 steps are 0.07 of its run.
        final_lr: Learning rate at the end, as a share of the peak.
    """

    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    warmup: float = 0.07
    final_lr: float = 0.0

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """Make the optimiser."""
        groups = parameter_groups(model, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)

    def learning_rate(self, step: int, steps: int) -> float:
        """Return the learning rate of optimiser step ``step`` of ``steps``, counted from 0."""
        return self.lr * warmup_cosine(step, steps, self.warmup, self.final_lr)


def warmup_cosine(step: int, steps: int, warmup: float, final: float) -> float:
    """Return the factor on the peak learning rate for optimiser step ``step`` of ``steps``, counted from 0."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters into those that decay (weights of linear and convolution layers) and the rest."""
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, layers)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in decayed], "weight_decay": 0.0},
    ]
