"""How a ray is walked: where its samples lie, and what stretch of it each of them stands for. Pure, float32."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.kernels.decode_along_rays import NOTHING
from lrm_pl.rendering.compositing import composite, sample_weights
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.sampling import importance, stratified, widened

#: "bins": a sample stands for the bin that it lies in (NeRF, TripoSR). "midpoints": two neighbors stand for the
#: stretch between them, with the mean of their raw densities and of their colors (mip-NeRF; EG3D, OpenLRM).
Quadrature = Literal["bins", "midpoints"]

#: The unit that density counts lengths in: scene units, or the part of the ray inside the bounds (TripoSR).
LengthUnit = Literal["scene", "chord"]

_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True)
class March:
    """The walk along a ray.

    Attributes:
        samples: K samples a ray, all told.
        importance: So many of them are placed where the others saw something.
        quadrature: What a sample stands for.
        unit: The unit of length.
    """

    samples: int
    importance: int = 0
    quadrature: Quadrature = "bins"
    unit: LengthUnit = "scene"

    def __post_init__(self) -> None:
        """Check the numbers."""
        first, least = self.samples - self.importance, 4 if self.quadrature == "midpoints" else 1
        if self.importance < 0 or first < least:
            raise InputError(
                expected=f"at least {least} samples a ray besides those placed by importance",
                found=f"{self.samples} with {self.importance} of them by importance",
                remedy="raise samples_per_ray",
            )


#: Raw density (r, k) and color (r, k, 3) at distances t (r, k) along rays.
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
Activate = Callable[[Tensor], Tensor]


def march_rays(
    march: March,
    near: Float[Tensor, " r"],
    far: Float[Tensor, " r"],
    jitter: Float[Tensor, " r"] | None,
    evaluate: Evaluate,
    activate: Activate,
) -> Rendering:
    """Walk along rays and composite what is there.

    Args:
        march: How.
        near: Start of each ray's interval.
        far: End of it, larger.
        jitter: Position of the samples in their bins, in [0, 1); None for the middle.
        evaluate: Reads the field at distances; called once, or twice with importance sampling.
        activate: Makes raw density positive.

    Returns:
        Pixels. Differentiable in what ``evaluate`` returned; places of samples are constants.
    """
    first = march.samples - march.importance
    t, _ = stratified(near, far, first, jitter, overshoot=march.quadrature == "midpoints")
    raw, rgb = evaluate(t)
    if march.importance:
        with torch.no_grad():
            sigma, _, _, delta = stretches(march, raw, rgb, t, near, far, activate)
            weights = widened(sample_weights(sigma, delta))
            if march.quadrature == "midpoints":
                # As EG3D has it, half a stretch early; trained weights know it that way.
                edges, weights = (t[:, 1:-1] + t[:, :-2]) / 2, weights[:, 1:-1]
            else:
                edges = bin_edges(t, near, far)
            more = importance(edges, weights, march.importance, jitter)
        more_raw, more_rgb = evaluate(more)
        t, order = torch.cat([t, more], dim=-1).sort(dim=-1)
        raw = torch.cat([raw, more_raw], dim=-1).gather(-1, order)
        rgb = torch.cat([rgb, more_rgb], dim=-2).gather(-2, order.unsqueeze(-1).expand(-1, -1, 3))
    return composite(*stretches(march, raw, rgb, t, near, far, activate))


def stretches(
    march: March,
    raw: Float[Tensor, "r k"],
    rgb: Float[Tensor, "r k 3"],
    t: Float[Tensor, "r k"],
    near: Float[Tensor, " r"],
    far: Float[Tensor, " r"],
    activate: Activate,
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "r n 3"], Float[Tensor, "r n"], Float[Tensor, "r #n"]]:
    """Turn samples into the stretches that they stand for: density, color, distance, length."""
    chord = (far - near).unsqueeze(-1)
    if march.quadrature == "midpoints":
        raw = raw.masked_fill(t > far.unsqueeze(-1), NOTHING)
        sigma, rgb = activate((raw[:, 1:] + raw[:, :-1]) / 2), (rgb[:, 1:] + rgb[:, :-1]) / 2
        delta, t = t.diff(dim=-1), (t[:, 1:] + t[:, :-1]) / 2
    else:
        sigma = activate(raw)
        delta = bin_edges(t, near, far).diff(dim=-1) if march.importance else chord / march.samples
    # A ray that misses has a chord of length 0.
    return sigma, rgb, t, delta / chord.clamp_min(_TINY) if march.unit == "chord" else delta


def bin_edges(
    t: Float[Tensor, "r k"], near: Float[Tensor, " r"], far: Float[Tensor, " r"]
) -> Float[Tensor, "r k_plus_1"]:
    """Cut [near, far] half way between neighboring samples."""
    return torch.cat([near.unsqueeze(-1), (t[:, 1:] + t[:, :-1]) / 2, far.unsqueeze(-1)], dim=-1)
