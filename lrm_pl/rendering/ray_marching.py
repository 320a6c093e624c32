"""Ray marching: sample placement, quadrature intervals and compositing. Pure functions, float32."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.errors import InputError
from lrm_pl.kernels.decode_along_rays import EMPTY_RAW_DENSITY
from lrm_pl.rendering.compositing import composite, sample_weights
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.sampling import blur_weights, sample_importance, sample_stratified

#: Quadrature rule. "bins": one interval per sample, the bin that contains it (NeRF, TripoSR). "midpoints": one interval
#: per pair of neighboring samples, with the mean of their raw densities and of their colors (mip-NeRF; EG3D, OpenLRM).
Quadrature = Literal["bins", "midpoints"]

#: Unit of length of density: the scene unit, or the length of the ray inside the bounds (TripoSR).
LengthUnit = Literal["scene", "chord"]

_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True)
class RayMarching:
    """Settings of ray marching.

    Attributes:
        samples: Total number K of samples per ray.
        importance: Number of these that are placed by importance sampling.
        quadrature: Quadrature rule.
        unit: Unit of length of density.
    """

    samples: int
    importance: int = 0
    quadrature: Quadrature = "bins"
    unit: LengthUnit = "scene"

    def __post_init__(self) -> None:
        """Validate the sample counts."""
        first, minimum = self.samples - self.importance, 4 if self.quadrature == "midpoints" else 1
        if self.importance < 0 or first < minimum:
            raise InputError(
                expected=f"at least {minimum} samples per ray in addition to importance samples",
                found=f"{self.samples} samples, of which {self.importance} are importance samples",
                remedy="raise samples_per_ray",
            )


#: Raw density (r, k) and color (r, k, 3) at distances t (r, k) along rays.
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
Activate = Callable[[Tensor], Tensor]


def march_rays(
    march: RayMarching,
    near: Float[Tensor, " r"],
    far: Float[Tensor, " r"],
    jitter: Float[Tensor, " r"] | None,
    evaluate: Evaluate,
    activate: Activate,
) -> Rendering:
    """March along rays and composite the samples.

    Args:
        march: Ray marching settings.
        near: Start of each ray's interval.
        far: End of the interval, larger than ``near``.
        jitter: Position of the samples in their bins, in [0, 1); None for bin centers.
        evaluate: Evaluates the field at distances; called once, or twice with importance sampling.
        activate: Maps raw density to density.

    Returns:
        Pixels. Differentiable in the outputs of ``evaluate``; sample positions are constants.
    """
    first = march.samples - march.importance
    t, _ = sample_stratified(near, far, first, jitter, overshoot=march.quadrature == "midpoints")
    raw, rgb = evaluate(t)
    if march.importance:
        with torch.no_grad():
            sigma, _, _, delta = quadrature_intervals(march, raw, rgb, t, near, far, activate)
            weights = blur_weights(sample_weights(sigma, delta))
            if march.quadrature == "midpoints":
                # Half an interval early, as in EG3D; published weights were trained this way.
                edges, weights = (t[:, 1:-1] + t[:, :-2]) / 2, weights[:, 1:-1]
            else:
                edges = bin_edges(t, near, far)
            more = sample_importance(edges, weights, march.importance, jitter)
        more_raw, more_rgb = evaluate(more)
        t, order = torch.cat([t, more], dim=-1).sort(dim=-1)
        raw = torch.cat([raw, more_raw], dim=-1).gather(-1, order)
        rgb = torch.cat([rgb, more_rgb], dim=-2).gather(-2, order.unsqueeze(-1).expand(-1, -1, 3))
    return composite(*quadrature_intervals(march, raw, rgb, t, near, far, activate))


def quadrature_intervals(
    march: RayMarching,
    raw: Float[Tensor, "r k"],
    rgb: Float[Tensor, "r k 3"],
    t: Float[Tensor, "r k"],
    near: Float[Tensor, " r"],
    far: Float[Tensor, " r"],
    activate: Activate,
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "r n 3"], Float[Tensor, "r n"], Float[Tensor, "r #n"]]:
    """Return density, color, midpoint distance and length of each quadrature interval."""
    chord = (far - near).unsqueeze(-1)
    if march.quadrature == "midpoints":
        raw = raw.masked_fill(t > far.unsqueeze(-1), EMPTY_RAW_DENSITY)
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
    """Return bin edges: near, the midpoints between neighboring samples, and far."""
    return torch.cat([near.unsqueeze(-1), (t[:, 1:] + t[:, :-1]) / 2, far.unsqueeze(-1)], dim=-1)
