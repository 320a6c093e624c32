"""The NeRF MLP, which maps the features of a point to density and color (LRM, section 3.3).

The first linear layer can be folded into the planes because it commutes with bilinear sampling:
W [f_xy; f_xz; f_yz] = sum_p sample(W_p planes_p). Folding is exact, and the widest layer is not applied to
individual samples. Folding is faster if the MLP is narrower than the three concatenated feature vectors.
"""

from itertools import pairwise
from typing import Literal, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lrm_pl.errors import InputError
from lrm_pl.kernels.linear import HiddenActivation, activation, linear_activated
from lrm_pl.models.triplane import Triplane, TriplaneField

DensityActivation = Literal["softplus", "exp"]


@final
class NeRFDecoder(nn.Module):
    """MLP that predicts density and color together, independently of the view direction.

    The density is softplus(x + density_bias) or exp(x + density_bias), and the color is a scaled sigmoid.

    Args:
        channels: Number F of channels per plane.
        width: Width of the hidden layers.
        layers: Number of linear layers, including the output layer of width 4 (LRM: 10; OpenLRM: 4).
        activation: Activation between the layers, ReLU (OpenLRM) or SiLU (TripoSR).
        density_activation: Activation of the density, softplus (OpenLRM) or exp (TripoSR).
        density_bias: Bias that is added to the raw density before the activation. The value -1 initializes a nearly
            empty field.
        color_margin: Margin by which the range of colors exceeds [0, 1] at each end, so that black and white can be
            reached (OpenLRM: 0.001; TripoSR: 0).
        fold: Whether to fold the first layer into the planes. Folding does not change the result.
    """

    def __init__(
        self,
        channels: int = 80,
        width: int = 64,
        layers: int = 10,
        activation: HiddenActivation = "relu",
        density_activation: DensityActivation = "softplus",
        density_bias: float = -1.0,
        color_margin: float = 0.001,
        *,
        fold: bool = True,
    ) -> None:
        super().__init__()
        if layers < 2:
            raise InputError(expected="at least 2 layers", found=layers)
        sizes = [3 * channels, *[width] * (layers - 1), 4]
        linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for layer in linears[:-1]:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(linears[-1].bias)
        self.layers = nn.ModuleList(linears)
        self.channels, self.fold, self.activation = channels, fold, activation
        self.density_activation, self.density_bias = density_activation, density_bias
        self.color_margin = color_margin

    def field(self, triplane: Triplane) -> TriplaneField:
        """Combine triplanes and this decoder into radiance fields that can be rendered."""
        first, *others = cast(list[nn.Linear], list(self.layers))
        weights: tuple[Tensor, ...] = tuple(x for layer in others for x in (layer.weight, layer.bias))
        planes = triplane.upright()
        if self.fold:
            per_plane = first.weight.view(-1, 3, self.channels)  # (width, 3, F)
            planes = torch.einsum("bpfij,wpf->bpijw", planes, per_plane)
            weights = (first.bias, *weights)
        else:
            planes = planes.permute(0, 1, 3, 4, 2)
            weights = (first.weight, first.bias, *weights)
        reduce: Literal["sum", "concat"] = "sum" if self.fold else "concat"
        return TriplaneField(
            planes.float().contiguous(),
            weights,
            self.decode,
            self.density,
            self.color,
            self.activation,
            reduce,
            triplane.axes,
        )

    def decode(
        self, features: Float[Tensor, "Q G"], weights: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "Q"], Float[Tensor, "Q 3"]]:
        """Decode features to raw densities and colors in float32.

        Args:
            features: Features of Q points.
            weights: Weights in the order of ``TriplaneField.weights``.
        """
        x = self.mlp(features, weights)
        return x[:, 0], self.color(x[:, 1:])

    def mlp(self, features: Float[Tensor, "Q G"], weights: tuple[Tensor, ...]) -> Float[Tensor, "Q 4"]:
        """Return raw densities and color logits in float32."""
        if torch.is_autocast_enabled(features.device.type):
            # Autocast casts the input of each linear layer. Casting here also halves the cost of the first activation.
            features = features.to(torch.get_autocast_dtype(features.device.type))
        if self.fold:
            x, weights = features + weights[0].to(features.dtype), weights[1:]
        else:
            x, weights = F.linear(features, weights[0], weights[1]), weights[2:]
        x = activation(x, self.activation)
        for weight, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
            x = linear_activated(x, weight, bias, self.activation)
        return F.linear(x, *weights[-2:]).float()

    def color(self, logits: Float[Tensor, "*points 3"]) -> Float[Tensor, "*points 3"]:
        """Map color logits to colors by a sigmoid with the range [-color_margin, 1 + color_margin]."""
        return torch.sigmoid(logits) * (1 + 2 * self.color_margin) - self.color_margin

    def density(self, raw: Float[Tensor, "*points"]) -> Float[Tensor, "*points"]:
        """Map raw densities to densities per unit of length. The renderer defines the unit of length."""
        raw = raw + self.density_bias
        # The clamp prevents overflow of the gradient of exp. Samples of density e^11 are opaque.
        return F.softplus(raw) if self.density_activation == "softplus" else raw.clamp_max(11.0).exp()
