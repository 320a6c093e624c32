"""LPIPS, a distance between image features of a frozen network (Zhang et al. 2018; LRM, section 3.4).

In each of five layers, the features are normalized over channels. The squared differences of the features are weighted
by a linear layer of LPIPS and averaged over pixels. The distance is the sum over the five layers.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, final

import lpips
import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.kernels.device import pixels_per_group

#: Networks for which LPIPS provides linear layers.
LpipsNet = Literal["vgg", "alex"]

#: Constant that is added to the norm of a feature vector, as in the lpips package.
_EPSILON = 1e-10


def require_measurable(side: int) -> None:
    """Raise an error if images are too small for the four pooling layers of VGG.

    Args:
        side: Shorter side of the images in pixels.

    Raises:
        InputError: The side is less than 16 pixels.
    """
    if side < 16:
        raise InputError(
            expected="crops of at least 16 pixels for LPIPS",
            found=side,
            remedy="increase --data.crop.size, or disable LPIPS with --model.objective.lpips 0",
        )


def require_image_pairs(prediction: Tensor, target: Tensor) -> None:
    """Check that predictions and targets are RGB images of the same shape (n, 3, h, w) with n > 0.

    Raises:
        ValueError: The shapes differ, or are not (n, 3, h, w).
    """
    shape = prediction.shape
    if shape != target.shape or len(shape) != 4 or shape[1] != 3 or prediction.numel() == 0:
        raise ValueError(
            "expected two non-empty batches of RGB images of the same shape (n, 3, h, w), but found prediction "
            f"{tuple(shape)} and target {tuple(target.shape)}"
        )


@final
class PerceptualLoss:
    """LPIPS of images in [0, 1], which is differentiable with respect to the prediction only.

    This class is not an ``nn.Module``, so a module with a ``PerceptualLoss`` as an attribute does not save, cast, shard
    or train it. Call ``to`` to move the network to a device. The network uses the channels-last memory format and
    the autocast state of the caller, and the distance is computed in float32.

    Attributes:
        name: Name of the network.
        network: Frozen network of the lpips package.

    Args:
        features: Convolution weights with the keys of torchvision (``features.<i>.weight``, ``features.<i>.bias``).
        net: Network to which the weights belong. LRM uses VGG.
    """

    def __init__(self, features: Mapping[str, Tensor], net: LpipsNet = "vgg") -> None:
        self.name = net
        self.network = _build(features, net)

    def to(self, device: torch.device | str) -> "PerceptualLoss":
        """Move the network to a device without changing its dtype."""
        self.network.to(device)
        return self

    def __call__(
        self, prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]
    ) -> Float[Tensor, " n"]:
        """Compute the LPIPS of each image.

        Args:
            prediction: Predicted sRGB images in [0, 1].
            target: Target images of the same shape, for which no gradients are computed.

        Returns:
            Float32 distances, which are 0 for equal images.

        Raises:
            ValueError: The shapes differ, or are not (n, 3, h, w).
        """
        require_image_pairs(prediction, target)
        group = max(1, pixels_per_group(prediction.device) // (prediction.shape[-1] * prediction.shape[-2]))
        if torch.is_grad_enabled() and prediction.requires_grad:
            return _EagerGradient.apply(prediction, target, self._measure, group)
        pairs = zip(torch.split(prediction, group), torch.split(target, group), strict=True)
        return torch.cat([self._measure(predicted, expected) for predicted, expected in pairs])

    def features(self, images: Float[Tensor, "n 3 h w"]) -> tuple[Tensor, ...]:
        """Return the features for ``distance`` without gradients, so that several comparisons can use them."""
        with torch.no_grad():
            return self._features(images)

    def distance(self, prediction: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Float[Tensor, " n"]:
        """Compute LPIPS from two results of ``features``. Batches of size 1 are broadcast."""
        distances = [
            _distance(a, b, linear.model[-1].weight.flatten())
            for a, b, linear in zip(prediction, target, self.network.lins, strict=True)
        ]
        return torch.stack(distances).sum(0)

    def _measure(
        self, prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]
    ) -> Float[Tensor, " n"]:
        with torch.no_grad():
            target_features = self._features(target)
        predicted_features = self._features(prediction)
        with torch.autocast(prediction.device.type, enabled=False):
            return self.distance(predicted_features, target_features)

    def _features(self, images: Float[Tensor, "n 3 h w"]) -> tuple[Tensor, ...]:
        """Run the network on images in [0, 1] and return five feature maps (n, c, h', w')."""
        scaled = self.network.scaling_layer(2 * images.float() - 1)
        layers: tuple[Tensor, ...] = self.network.net(scaled.contiguous(memory_format=torch.channels_last))
        return layers


class _EagerGradient(torch.autograd.Function):
    """LPIPS distances whose gradients are computed in the forward pass, one group of images at a time.

    Only the activations of one group of images are in memory at a time. The backward pass scales the gradients, so the
    total computation is the same as with an ordinary autograd graph.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        prediction: Tensor,
        target: Tensor,
        measure: Callable[[Tensor, Tensor], Tensor],
        group: int,
    ) -> Tensor:
        # A gradient scaler acts only later. Scaling the distances here keeps small float16 gradients from underflow.
        half = torch.is_autocast_enabled(prediction.device.type) and (
            torch.get_autocast_dtype(prediction.device.type) == torch.float16
        )
        scale = 2.0**16 if half else 1.0
        distances: list[Tensor] = []
        gradients: list[Tensor] = []
        for images, targets in zip(
            torch.split(prediction.detach(), group), torch.split(target, group), strict=True
        ):
            with torch.enable_grad():
                leaf = images.requires_grad_()
                distance = measure(leaf, targets)
                (gradient,) = torch.autograd.grad(distance.sum() * scale, leaf)
            gradients.append(gradient / scale)
            distances.append(distance.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(distances)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None, None, None], None, None, None


def _distance(
    prediction: Float[Tensor, "#n c h w"], target: Float[Tensor, "#n c h w"], weight: Float[Tensor, " c"]
) -> Float[Tensor, " n"]:
    """Return the mean over pixels of weighted squared differences of normalized features.

    If all features are zero, the gradient of ``vector_norm`` is 0, whereas the gradient of the square root in the lpips
    package is NaN.
    """
    # Features are stored channels last, so the permutation to (n, h, w, c) is contiguous.
    a, b = (layer.float().permute(0, 2, 3, 1) for layer in (prediction, target))
    a = a / (torch.linalg.vector_norm(a, dim=-1, keepdim=True) + _EPSILON)
    b = b / (torch.linalg.vector_norm(b, dim=-1, keepdim=True) + _EPSILON)
    weighted: Tensor = (a - b).square() @ weight
    return weighted.mean((1, 2))


def _build(features: Mapping[str, Tensor], net: LpipsNet) -> lpips.LPIPS:
    """Build the lpips network, and load the given convolution weights and the linear layers of the package.

    The network is built on the meta device because torchvision would otherwise draw 138 million random weights, which
    takes seconds and advances the global random state.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        # lpips 0.1.4 passes `pretrained` to torchvision, which is deprecated since torchvision 0.13.
        for message in ("The parameter 'pretrained'", "Arguments other than a weight enum"):
            warnings.filterwarnings("ignore", message, UserWarning, r"torchvision\.models\._utils")
        model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    package = Path(lpips.__file__).parent
    linear = torch.load(package / "weights" / "v0.1" / f"{net}.pth", map_location="cpu", weights_only=True)
    # lpips registers each linear layer as `lin0` and `lins.0`, but the weight file contains only `lin0`.
    linear |= {name.replace("lin", "lins.", 1): value for name, value in linear.items()}
    scaling = {name: value for name, value in model.state_dict().items() if name.startswith("scaling_layer.")}
    # net.slice<j>.<i>.<name> is torchvision's features.<i>.<name>
    names = {
        name: f"features.{name.split('.', 2)[2]}" for name in model.state_dict() if name.startswith("net.")
    }
    if set(features) != set(names.values()):
        raise ValueError(
            f"LPIPS ({net}): expected the convolutions {sorted(names.values())}, but found {sorted(features)}. "
            "Pass the features of this network"
        )
    convolutions = {name: features[key].clone() for name, key in names.items()}
    model.load_state_dict(linear | scaling | convolutions, strict=True, assign=True)
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
