"""The training objective: named, weighted terms (LRM, section 3.4: MSE + 2.0 LPIPS)."""

import dataclasses

from jaxtyping import Float
from torch import Tensor, nn

from lrm_pl.errors import InputError
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.losses.photometric import mask, mse
from lrm_pl.losses.regularizers import opacity_prior, total_variation


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """What the terms look at: n views of B objects.

    Attributes:
        prediction: Rendered views over their backgrounds.
        target: True views over the same backgrounds.
        opacity: Opacity of the rendered views.
        alpha: Coverage by the object in the true views.
        planes: The objects' planes.
    """

    prediction: Float[Tensor, "n 3 h w"]
    target: Float[Tensor, "n 3 h w"]
    opacity: Float[Tensor, "n h w"]
    alpha: Float[Tensor, "n h w"]
    planes: Float[Tensor, "B 3 F S S"]


class Objective(nn.Module):
    """Sum weighted loss terms; a term of weight 0 is not computed.

    A subclass adds terms of its own to what ``forward`` returns; ``model.objective.class_path`` names it.

    Args:
        mse: Weight of the mean squared error.
        lpips: Weight of LPIPS (VGG).
        lpips_start_step: First optimizer step with LPIPS: a blurry start learns faster without it (advice of LGM's
            authors).
        mask: Weight of the cross-entropy of opacity against coverage (TripoSR: 0.05); removes floaters.
        tv: Weight of the planes' total variation (OpenLRM: 5e-4).
        opacity: Weight of the prior that pixels are clear or opaque.
    """

    def __init__(
        self,
        mse: float = 1.0,
        lpips: float = 2.0,
        lpips_start_step: int = 0,
        mask: float = 0.0,
        tv: float = 0.0,
        opacity: float = 0.0,
    ) -> None:
        super().__init__()
        weights = {"mse": mse, "lpips": lpips, "mask": mask, "tv": tv, "opacity": opacity}
        if any(weight < 0 for weight in weights.values()):
            raise InputError(expected="weights of 0 or more in the objective", found=weights)
        self.mse, self.lpips, self.lpips_start_step = mse, lpips, lpips_start_step
        self.mask, self.tv, self.opacity = mask, tv, opacity
        self.perceptual: PerceptualLoss | None = None

    def forward(self, evidence: LossInputs, step: int) -> dict[str, Float[Tensor, ""]]:
        """Compute the weighted terms by name; the loss is their sum.

        Args:
            evidence: What was rendered, and what it should be.
            step: Optimizer steps done.

        Raises:
            ValueError: LPIPS is due but no network was attached.
        """
        terms = {}
        if self.mse:
            terms["mse"] = self.mse * mse(evidence.prediction, evidence.target)
        if self.lpips and step >= self.lpips_start_step:
            if self.perceptual is None:
                raise ValueError(
                    "expected a PerceptualLoss in objective.perceptual, but found none; `lrm fit` attaches "
                    "one, in Python "
                    "set it, or give LPIPS the weight 0 (--model.objective.lpips 0)"
                )
            terms["lpips"] = self.lpips * self.perceptual(evidence.prediction, evidence.target).mean()
        if self.mask:
            terms["mask"] = self.mask * mask(evidence.opacity, evidence.alpha)
        if self.tv:
            terms["tv"] = self.tv * total_variation(evidence.planes)
        if self.opacity:
            terms["opacity"] = self.opacity * opacity_prior(evidence.opacity)
        return terms
