"""Training objective, a weighted sum of named loss terms (MSE + 2.0 LPIPS in LRM, section 3.4)."""

import dataclasses

from jaxtyping import Float
from torch import Tensor, nn

from lrm_pl.errors import InputError
from lrm_pl.losses.perceptual import PerceptualLoss
from lrm_pl.losses.photometric import mask_loss, mse_loss
from lrm_pl.losses.regularizers import opacity_prior, total_variation


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """Inputs of the loss terms for n views of B objects.

    Attributes:
        prediction: Rendered views, composited over a background.
        target: Ground truth views, composited over the same background.
        opacity: Opacity of the rendered views.
        alpha: Alpha channel of the ground truth views.
        planes: Triplanes of the objects.
    """

    prediction: Float[Tensor, "n 3 h w"]
    target: Float[Tensor, "n 3 h w"]
    opacity: Float[Tensor, "n h w"]
    alpha: Float[Tensor, "n h w"]
    planes: Float[Tensor, "B 3 F S S"]


class Objective(nn.Module):
    """Weighted sum of loss terms, without learnable parameters.

    Terms with weight 0 are not computed. To add terms, override ``forward`` in a subclass, and select the subclass with
    ``model.objective.class_path``.

    Args:
        mse: Weight of the mean squared error.
        lpips: Weight of LPIPS with VGG.
        lpips_start_step: First optimizer step with LPIPS. Earlier steps are faster because LPIPS is not computed.
        mask: Weight of the cross-entropy between opacity and alpha, which removes floaters (TripoSR: 0.05).
        tv: Weight of the total variation of the planes (OpenLRM: 5e-4).
        opacity: Weight of a prior that favors pixels that are either fully transparent or fully opaque.
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
            raise InputError(expected="non-negative weights in the objective", found=weights)
        self.mse, self.lpips, self.lpips_start_step = mse, lpips, lpips_start_step
        self.mask, self.tv, self.opacity = mask, tv, opacity
        self.perceptual: PerceptualLoss | None = None

    def forward(self, inputs: LossInputs, step: int) -> dict[str, Float[Tensor, ""]]:
        """Compute the weighted terms, whose sum is the loss.

        Args:
            inputs: Rendered and ground truth views.
            step: Number of completed optimizer steps.

        Returns:
            Weighted terms by name.

        Raises:
            ValueError: LPIPS is enabled but ``perceptual`` is None.
        """
        terms = {}
        if self.mse:
            terms["mse"] = self.mse * mse_loss(inputs.prediction, inputs.target)
        if self.lpips and step >= self.lpips_start_step:
            if self.perceptual is None:
                raise ValueError(
                    "objective.perceptual is None. Set it to a PerceptualLoss, as `lrm fit` does, or disable LPIPS "
                    "with --model.objective.lpips 0"
                )
            terms["lpips"] = self.lpips * self.perceptual(inputs.prediction, inputs.target).mean()
        if self.mask:
            terms["mask"] = self.mask * mask_loss(inputs.opacity, inputs.alpha)
        if self.tv:
            terms["tv"] = self.tv * total_variation(inputs.planes)
        if self.opacity:
            terms["opacity"] = self.opacity * opacity_prior(inputs.opacity)
        return terms
