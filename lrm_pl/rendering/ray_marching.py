"""Ray marching, which consists of sample placement, quadrature and compositing.

All functions are pure and compute in float32.
"""

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

#: Quadrature rule. "bins" has one interval per sample, namely the bin that contains the sample (NeRF, TripoSR).
#: "midpoints" has one interval per pair of neighboring samples, and averages their raw densities and their colors
#: (mip-NeRF, EG3D, OpenLRM).
Quadrature = Literal["bins", "midpoints"]

#: Unit of length for densities: the scene unit, or the length of the ray inside the bounds (TripoSR).
LengthUnit = Literal["scene", "chord"]

_TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True)
class RayMarching:
    """Settings of ray marching.

    Attributes:
        samples: Total number K of samples per ray, including importance samples.
        importance: Number of the K samples that are placed by importance sampling.
        quadrature: Quadrature rule.
        unit: Unit of length for densities.
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
                remedy="increase samples_per_ray",
            )


@dataclasses.dataclass(frozen=True)
class RayBundle:
    """Rays of B objects.

    Attributes:
        origins: Ray origins. Row b contains the rays of all views of object b.
        directions: Unit directions of the rays.
        near: Distance at which the interval of each ray starts.
        far: Distance at which the interval of each ray ends. Rays with far <= near are empty and are not evaluated.
        jitter: Positions of the samples in their bins, in [0, 1). If None, samples are at bin centers.
    """

    origins: Float[Tensor, "B R 3"]
    directions: Float[Tensor, "B R 3"]
    near: Float[Tensor, "B R"]
    far: Float[Tensor, "B R"]
    jitter: Float[Tensor, "B R"] | None = None


#: Function from distances t (r, k) along rays to raw densities (r, k) and colors (r, k, 3).
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
        near: Distance at which the interval of each ray starts.
        far: Distance at which the interval of each ray ends, larger than ``near``.
        jitter: Positions of the samples in their bins, in [0, 1). If None, samples are at bin centers.
        evaluate: Function that evaluates the field at distances along the rays. It is called twice with importance
            sampling and once otherwise.
        activate: Function from raw densities to densities.

    Returns:
        Pixels, which are differentiable with respect to the outputs of ``evaluate``. Sample positions are constants.
    """
    first = march.samples - march.importance
    t, _ = sample_stratified(near, far, first, jitter, overshoot=march.quadrature == "midpoints")
    raw, rgb = evaluate(t)
    if march.importance:
        with torch.no_grad():
            sigma, _, _, delta = quadrature_intervals(march, raw, rgb, t, near, far, activate)
            weights = blur_weights(sample_weights(sigma, delta))
            if march.quadrature == "midpoints":
                # These edges are half an interval too close, as in EG3D, because published weights were trained so.
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
    """Return the density, color, distance and length of each quadrature interval."""
    chord = (far - near).unsqueeze(-1)
    if march.quadrature == "midpoints":
        raw = raw.masked_fill(t > far.unsqueeze(-1), EMPTY_RAW_DENSITY)
        sigma, rgb = activate((raw[:, 1:] + raw[:, :-1]) / 2), (rgb[:, 1:] + rgb[:, :-1]) / 2
        delta, t = t.diff(dim=-1), (t[:, 1:] + t[:, :-1]) / 2
    else:
        sigma = activate(raw)
        delta = bin_edges(t, near, far).diff(dim=-1) if march.importance else chord / march.samples
    # A ray that misses the bounds has a chord of length 0.
    return sigma, rgb, t, delta / chord.clamp_min(_TINY) if march.unit == "chord" else delta


def bin_edges(
    t: Float[Tensor, "r k"], near: Float[Tensor, " r"], far: Float[Tensor, " r"]
) -> Float[Tensor, "r k_plus_1"]:
    """Return the bin edges, which are ``near``, the midpoints between neighboring samples, and ``far``."""
    return torch.cat([near.unsqueeze(-1), (t[:, 1:] + t[:, :-1]) / 2, far.unsqueeze(-1)], dim=-1)
