"""LPIPS: the distance of two images in the features of a frozen network (Zhang et al. 2018; LRM, sec. 3.4).

For each of five layers, features are normalized over channels, their squared differences weighted by LPIPS'
own linear layer, averaged over pixels, and added up. (n, 3, h, w) twice -> (n,).
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

#: Networks that LPIPS has linear layers for.
LpipsNet = Literal["vgg", "alex"]

#: Added to the norm of a feature vector, as lpips does.
_EPSILON = 1e-10


def require_measurable(side: int) -> None:
    """Refuse images that VGG's four poolings leave nothing of.

    Args:
        side: Shorter side of the images, pixels.

    Raises:
        InputError: It is below 16.
    """
    if side < 16:
        raise InputError(
            expected="crops of 16 pixels or more for LPIPS",
            found=side,
            remedy="give a larger --data.crop.size, or --model.objective.lpips 0",
        )


@final
class PerceptualLoss:
    """LPIPS of images in [0, 1], differentiable to the prediction only.

    It is a plain object, not an ``nn.Module``: its owner keeps it as an attribute, so nothing wraps, casts,
    saves, averages or trains it; the owner also moves it (``to``).

    The network runs under the caller's autocast, channels last, the distance in float32. 16 images, 64 px,
    with VGG, forward and backward, 2 CPU cores: 0.35 s in bf16, 0.65 s in fp32. Channels first takes a third
    more processor time in fp32 and half as much again in bf16.

    Attributes:
        name: Which network it is.
        network: lpips' own, frozen.

    Args:
        features: The network's convolutions in torchvision's names (``features.<i>.weight``, ``.bias``).
        net: Which network they belong to; LRM trains with VGG.
    """

    def __init__(self, features: Mapping[str, Tensor], net: LpipsNet = "vgg") -> None:
        self.name = net
        self.network = _build(features, net)

    def to(self, device: torch.device | str) -> "PerceptualLoss":
        """Move the network; its numbers stay float32."""
        self.network.to(device)
        return self

    def __call__(
        self, prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]
    ) -> Float[Tensor, " n"]:
        """Measure LPIPS image by image.

        Args:
            prediction: sRGB images in [0, 1]; gradients flow to them.
            target: Images of the same size; no gradient flows to them.

        Returns:
            Distances, float32; 0 for equal images.

        Raises:
            ValueError: The shapes differ, or are not those of RGB images.
        """
        if prediction.shape != target.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
            raise ValueError(
                "LPIPS: expected two batches of RGB images (n, 3, h, w) of one shape, but found prediction "
                f"{tuple(prediction.shape)} and target {tuple(target.shape)}; resize or crop one of them"
            )
        group = max(1, pixels_per_group(prediction.device) // (prediction.shape[-1] * prediction.shape[-2]))
        if torch.is_grad_enabled() and prediction.requires_grad:
            return _GradientAtOnce.apply(prediction, target, self._measure, group)
        pairs = zip(torch.split(prediction, group), torch.split(target, group), strict=True)
        return torch.cat([self._measure(ours, theirs) for ours, theirs in pairs])

    def features(self, images: Float[Tensor, "n 3 h w"]) -> tuple[Tensor, ...]:
        """Return what ``distance`` compares: worth keeping where images are compared more than once. No gradients."""
        with torch.no_grad():
            return self._features(images)

    def distance(self, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Float[Tensor, " n"]:
        """Measure LPIPS of images by their ``features``; either may be those of one image."""
        distances = [
            _distance(a, b, linear.model[-1].weight.flatten())
            for a, b, linear in zip(ours, theirs, self.network.lins, strict=True)
        ]
        return torch.stack(distances).sum(0)

    def _measure(
        self, prediction: Float[Tensor, "n 3 h w"], target: Float[Tensor, "n 3 h w"]
    ) -> Float[Tensor, " n"]:
        with torch.no_grad():
            true = self._features(target)
        drawn = self._features(prediction)
        with torch.autocast(prediction.device.type, enabled=False):
            return self.distance(drawn, true)

    def _features(self, images: Float[Tensor, "n 3 h w"]) -> tuple[Tensor, ...]:
        """Run the network on images in [0, 1]; five tensors (n, c, h', w')."""
        scaled = self.network.scaling_layer(2 * images.float() - 1)
        layers: tuple[Tensor, ...] = self.network.net(scaled.contiguous(memory_format=torch.channels_last))
        return layers


class _GradientAtOnce(torch.autograd.Function):
    """Measure group by group of images, and differentiate each at once: one group's activations are held at a time.

    No more work than an ordinary graph: what it would do in backward is done here, and only scaled there.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        prediction: Tensor,
        target: Tensor,
        measure: Callable[[Tensor, Tensor], Tensor],
        group: int,
    ) -> Tensor:
        # What a gradient scaler would do comes too late here: half precision would lose small gradients inside.
        half = torch.is_autocast_enabled(prediction.device.type) and (
            torch.get_autocast_dtype(prediction.device.type) == torch.float16
        )
        scale = 2.0**16 if half else 1.0
        distances: list[Tensor] = []
        gradients: list[Tensor] = []
        for ours, theirs in zip(
            torch.split(prediction.detach(), group), torch.split(target, group), strict=True
        ):
            with torch.enable_grad():
                leaf = ours.requires_grad_()
                distance = measure(leaf, theirs)
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
    ours: Float[Tensor, "#n c h w"], theirs: Float[Tensor, "#n c h w"], weight: Float[Tensor, " c"]
) -> Float[Tensor, " n"]:
    """Average the weighted squared differences of normalized features over pixels.

    ``vector_norm`` has the gradient 0 where all features are 0; lpips' own square root of a sum has NaN.
    """
    # The memory is channels last already, so (n, h, w, c) is a view.
    a, b = (layer.float().permute(0, 2, 3, 1) for layer in (ours, theirs))
    a = a / (torch.linalg.vector_norm(a, dim=-1, keepdim=True) + _EPSILON)
    b = b / (torch.linalg.vector_norm(b, dim=-1, keepdim=True) + _EPSILON)
    weighted: Tensor = (a - b).square() @ weight
    return weighted.mean((1, 2))


def _build(features: Mapping[str, Tensor], net: LpipsNet) -> lpips.LPIPS:
    """Make lpips' network and give it weights, strictly: ours below, the package's own linear layers on top.

    It is made on the meta device: torchvision would otherwise first draw 138 million random numbers, which
    takes seconds and moves the random state of whoever asked for a loss.
    """
    with warnings.catch_warnings(), torch.device("meta"):
        # lpips 0.1.4 passes torchvision `pretrained`, deprecated since 0.13; nothing of ours can change that.
        for message in ("The parameter 'pretrained'", "Arguments other than a weight enum"):
            warnings.filterwarnings("ignore", message, UserWarning, r"torchvision\.models\._utils")
        model = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    package = Path(lpips.__file__).parent
    linear = torch.load(package / "weights" / "v0.1" / f"{net}.pth", map_location="cpu", weights_only=True)
    # lpips holds each linear layer under two names, `lin0` and `lins.0`; its file has the first.
    linear |= {name.replace("lin", "lins.", 1): value for name, value in linear.items()}
    scaling = {name: value for name, value in model.state_dict().items() if name.startswith("scaling_layer.")}
    # net.slice<j>.<i>.<kind> is torchvision's features.<i>.<kind>
    names = {
        name: f"features.{name.split('.', 2)[2]}" for name in model.state_dict() if name.startswith("net.")
    }
    if set(features) != set(names.values()):
        raise ValueError(
            f"LPIPS ({net}): expected the convolutions {sorted(names.values())}, but found {sorted(features)}; "
            "give the features of this network"
        )
    convolutions = {name: features[theirs].clone() for name, theirs in names.items()}
    model.load_state_dict(linear | scaling | convolutions, strict=True, assign=True)
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
