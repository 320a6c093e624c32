"""The training objective: named, weighted terms (LRM, section 3.4: MSE + 2.0 LPIPS)."""

from typing import final

from jaxtyping import Float
from torch import Tensor

from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.losses.photometric import mse


@final
class Objective:
    """Sum weighted loss terms; a term of weight 0 is not computed.

    Args:
        mse: Weight of the mean squared error.
        lpips: Weight of LPIPS (VGG).
        lpips_start_step: First optimiser step with LPIPS: a blurry start learns faster without it.
    """

    def __init__(self, mse: float = 1.0, lpips: float = 2.0, lpips_start_step: int = 0) -> None:
        self.mse, self.lpips, self.lpips_start_step = mse, lpips, lpips_start_step
        self.perceptual: PerceptualLoss | None = None

    def __call__(
        self, prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"], step: int
    ) -> dict[str, Float[Tensor, ""]]:
        """Compute the weighted terms by name; the loss is their sum.

        Args:
            prediction: Rendered views over their backgrounds.
            target: True views over the same backgrounds.
            step: Optimiser steps done.

        Raises:
            ValueError: LPIPS is due but no network was attached.
        """
        terms = {}
        if self.mse:
            terms["mse"] = self.mse * mse(prediction, target)
        if self.lpips and step >= self.lpips_start_step:
            if self.perceptual is None:
                raise ValueError(
                    "expected a PerceptualLoss in objective.perceptual, found none; `lrm fit` attaches one, in Python "
                    "set it, or give LPIPS the weight 0 (--model.objective.lpips 0)"
                )
            terms["lpips"] = self.lpips * self.perceptual(prediction, target).mean()
        return terms
