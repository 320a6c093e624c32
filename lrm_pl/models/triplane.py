"""Triplanes, and radiance fields that combine a triplane and a decoder."""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.conventions import MIRRORED_PLANES, PLANE_AXES, PlaneLayout
from lrm_pl.kernels.linear import HiddenActivation
from lrm_pl.kernels.triplane import Axes, Reduce, accumulate_gradient, triplane_sample


@dataclasses.dataclass(frozen=True)
class Triplane:
    """Triplanes of B objects, each with three feature planes over [-1, 1]^3.

    Attributes:
        planes: Planes of shape (B, 3, F, S, S).
        layout: Orientation of the planes.
    """

    planes: Float[Tensor, "B 3 F S S"]
    layout: PlaneLayout = "lrm"

    @property
    def axes(self) -> Axes:
        """Column axis and row axis of each plane that ``upright`` returns."""
        return PLANE_AXES[self.layout]

    def upright(self) -> Float[Tensor, "B 3 F S S"]:
        """Return the planes after flipping the columns of mirrored planes."""
        mirrored = MIRRORED_PLANES[self.layout]
        if not mirrored:
            return self.planes
        planes = [
            self.planes[:, p].flip(-1) if p in mirrored else self.planes[:, p]
            for p in range(self.planes.shape[1])
        ]
        return torch.stack(planes, dim=1)


@dataclasses.dataclass(frozen=True)
class TriplaneField:
    """Radiance fields of B triplanes.

    This class implements ``rendering.field.Field``.

    Attributes:
        planes: Float32 planes of shape (B, 3, S, S, C), channels last. C is the width of the decoder if the first layer
            is folded into the planes, and F otherwise.
        weights: Differentiable weights of the decoder.
        decoder: Pure function from features and weights to raw densities and colors.
        activation: Pure function from raw densities to densities.
        color_activation: Pure function from color logits to colors.
        hidden_activation: Activation between the layers of the MLP.
        reduce: Whether the features of the three planes are summed (if the first layer is folded) or concatenated.
        axes: Column axis and row axis of each plane.
    """

    planes: Float[Tensor, "B 3 S S C"]
    weights: tuple[Tensor, ...]
    decoder: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]
    activation: Callable[[Tensor], Tensor]
    color_activation: Callable[[Tensor], Tensor]
    hidden_activation: HiddenActivation
    reduce: Reduce
    axes: Axes

    def sample(self, planes: Float[Tensor, "3 S S C"], points: Float[Tensor, "Q 3"]) -> Float[Tensor, "Q G"]:
        """Sample the features of one object at the given points."""
        return triplane_sample(planes, points, self.axes, self.reduce)

    def accumulate(
        self, total: Float[Tensor, "3 S S C"], points: Float[Tensor, "Q 3"], grad: Float[Tensor, "Q G"]
    ) -> None:
        """Add the gradient of ``sample`` with respect to the planes to ``total`` in place."""
        accumulate_gradient(total, points, grad, self.axes, self.reduce)

    def decode(
        self, features: Float[Tensor, "Q G"], weights: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "Q"], Float[Tensor, "Q 3"]]:
        """Decode features to raw densities and colors."""
        return self.decoder(features, weights)

    def activate(self, raw: Float[Tensor, "*points"]) -> Float[Tensor, "*points"]:
        """Map raw densities to densities."""
        return self.activation(raw)

    def color(self, logits: Float[Tensor, "*points 3"]) -> Float[Tensor, "*points 3"]:
        """Map color logits to colors."""
        return self.color_activation(logits)
