"""Images to look at, without gradients: empty space is passed over, and a ray ends when nothing is left to see.

The image is that of ``render_deferred`` to less than 1/255 (tested): densities too thin to be seen are taken for
nothing, and what lies behind an opacity of 0.999 is left out.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lrm_pl.kernels.decode_along_rays import NOTHING
from lrm_pl.kernels.device import on_cpu
from lrm_pl.rendering.compositing import sample_weights
from lrm_pl.rendering.deferred import Rays
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.occupancy import Occupancy
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.ray_marching import March, stretches
from lrm_pl.rendering.sampling import stratified

#: Light that may be left when a ray ends.
_LEFT = 1e-3

#: Samples of a ray between two looks at what is left of its light.
_SEGMENT = 16

#: Decodes points (q, 3); where a second tensor (q) is False, a point counts as empty.
Read = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


@torch.no_grad()
def render_skipping(
    field: Field,
    occupancies: Sequence[Occupancy],
    origins: Float[Tensor, "B R 3"],
    directions: Float[Tensor, "B R 3"],
    near: Float[Tensor, "B R"],
    far: Float[Tensor, "B R"],
    march: March,
    chunk: int,
) -> Rendering:
    """Render rays through the field of each object; the arguments are those of ``render_deferred``.

    Args:
        field: The objects' fields.
        occupancies: The occupied cells of each object.
        origins: Ray origins.
        directions: Unit directions.
        near: Start of each ray's interval.
        far: End of it.
        march: The walk along a ray, samples in the middle of their bins.
        chunk: Points considered at a time, at most.
    """
    by_parts = not march.importance and march.quadrature == "bins"
    # A ray that is walked in parts has fewer points in hand at a time, so that more rays make a chunk.
    at_once = min(_SEGMENT, march.samples) if by_parts else march.samples
    rays = Rays(origins, directions, near, far, None, max(1, chunk // at_once))
    planes, shape = field.planes, near.shape
    rgb, opacity, depth = (planes.new_zeros(size) for size in ((*shape, 3), shape, shape))

    def render(_: int, index: int, numbers: Tensor) -> None:
        def read(points: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
            kept = occupancies[index].occupied(points, among)
            raw, color = field.decode(field.sample(planes[index], points[kept]), field.weights)
            everywhere = raw.new_full((len(points),), NOTHING)
            return everywhere.index_copy(0, kept, raw), color.new_zeros(len(points), 3).index_copy(
                0, kept, color
            )

        if by_parts:
            pixels = _walk(rays, march, index, numbers, read, field.activate)
        else:
            pixels = rays.march(march, index, numbers, read, field.activate)
        rgb[index, numbers], opacity[index, numbers] = pixels.rgb, pixels.opacity
        depth[index, numbers] = pixels.depth

    rays.for_each_chunk(render)
    return Rendering(rgb, opacity, depth)


def _walk(
    rays: Rays, march: March, index: int, numbers: Tensor, read: Read, activate: Callable[[Tensor], Tensor]
) -> Rendering:
    """Walk from front to back, a few samples at a time, with those rays that still have light.

    On a CPU the other rays are left out; elsewhere their points are, since leaving out rays would wait for the device.
    """
    near, far = rays.near[index, numbers], rays.far[index, numbers]
    t, _ = stratified(near, far, march.samples, None)
    rgb, opacity, weighted_t = near.new_zeros(len(near), 3), torch.zeros_like(near), torch.zeros_like(near)
    going, ended_rays_stay = torch.arange(len(near), device=near.device), not on_cpu(near)
    for start in range(0, march.samples, _SEGMENT):
        part = t[going, start : start + _SEGMENT]
        seeing = (opacity < 1 - _LEFT).repeat_interleave(part.shape[1]) if ended_rays_stay else None
        raw, color = read(rays.points(index, numbers[going], part), seeing)
        raw, color = raw.view(part.shape), color.view(*part.shape, 3)
        sigma, color, _, delta = stretches(march, raw, color, part, near[going], far[going], activate)
        weights = sample_weights(sigma, delta) * (1 - opacity[going]).unsqueeze(-1)
        rgb[going] += (weights.unsqueeze(-1) * color).sum(dim=-2)
        weighted_t[going] += (weights * part).sum(dim=-1)
        opacity[going] += weights.sum(dim=-1)
        if not ended_rays_stay:
            going = going[opacity[going] < 1 - _LEFT]
            if not len(going):
                break
    return Rendering(rgb, opacity, weighted_t / opacity.clamp_min(1e-6))
