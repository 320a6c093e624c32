"""The volume renderer, which maps fields and cameras to images."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lrm_pl.errors import InputError
from lrm_pl.geometry.rays import Bounds, pixel_rays, ray_interval
from lrm_pl.kernels.device import points_per_chunk
from lrm_pl.rendering.deferred import Rays, render_deferred
from lrm_pl.rendering.empty_space import Occupancy, render_skipping
from lrm_pl.rendering.field import Field
from lrm_pl.rendering.fused import PixelGrid, PixelRays, is_fused, render_fused
from lrm_pl.rendering.output import Rendering
from lrm_pl.rendering.ray_marching import LengthUnit, Quadrature, RayBundle, RayMarching


@final
class Renderer(nn.Module):
    """Volume renderer without parameters (LRM, section 3.3).

    Args:
        samples_per_ray: Number K of samples per ray, which lie inside the bounds.
        importance_samples: Number of the K samples that are placed by importance sampling (OpenLRM: half).
        bounds: Region that contains the object: the unit sphere for sphere-normalized data, or the box [-1, 1]^3 for
            cube-normalized data.
        quadrature: Quadrature rule with one interval per sample, or per pair of neighboring samples (OpenLRM).
        unit: Unit of length for densities: the scene unit, or the length of the ray inside the bounds (TripoSR).
        chunk: Maximum number of points decoded at a time, which does not affect the result. If None, the maximum is
            32768 on a CPU, 262144 on an accelerator, and 2^21 (or 4 rows of pixels, if larger) with the fused decoder.
    """

    def __init__(
        self,
        samples_per_ray: int = 128,
        importance_samples: int = 0,
        bounds: Bounds = "sphere",
        quadrature: Quadrature = "bins",
        unit: LengthUnit = "scene",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise InputError(expected="a chunk of at least 1 point", found=chunk)
        self.march = RayMarching(samples_per_ray, importance_samples, quadrature, unit)
        self.bounds, self.chunk = bounds, chunk
        #: Functions that divide rays into chunks, which the simulation of a step replaces.
        self.ray_chunks: Callable[[RayBundle, int, int], Rays] = Rays
        self.pixel_rays: Callable[[RayBundle, PixelGrid], PixelRays] = PixelRays

    def forward(
        self,
        field: Field,
        c2w: Float[Tensor, "B V 4 4"],
        fxfycxcy: Float[Tensor, "B V 4"],
        size: tuple[int, int],
        jitter: Float[Tensor, "B V H W"] | None = None,
    ) -> Rendering:
        """Render V views of each object.

        Args:
            field: Fields of B objects.
            c2w: OpenCV poses of the views.
            fxfycxcy: Normalized intrinsics of the views.
            size: Height and width of the views in pixels.
            jitter: Positions of the samples of each ray in their bins, in [0, 1). If None, samples are at bin centers.

        Returns:
            Pixels of shape (B, V, H, W).
        """
        rays, shape = self.rays(c2w, fxfycxcy, size, jitter), (*c2w.shape[:2], *size)
        if is_fused(field, c2w.device):
            grid = PixelGrid(c2w.shape[1] * size[0], size[1], self.march.samples, self.chunk)
            return render_fused(field, self.pixel_rays(rays, grid), self.march).view(shape)
        chunks = self.ray_chunks(rays, self.chunk_on(c2w.device), self.march.samples)
        return render_deferred(field, chunks, self.march).view(shape)

    def draw(
        self,
        field: Field,
        occupancies: Sequence[Occupancy],
        c2w: Float[Tensor, "B V 4 4"],
        fxfycxcy: Float[Tensor, "B V 4"],
        size: tuple[int, int],
    ) -> Rendering:
        """Render without gradients, and skip empty space and occluded samples.

        The result differs from the result of ``forward`` by at most 1/255.

        Args:
            field: Fields of B objects.
            occupancies: Occupancy grid of each object (see ``measure_occupancy``).
            c2w: OpenCV poses of the views.
            fxfycxcy: Normalized intrinsics of the views.
            size: Height and width of the views in pixels.

        Returns:
            Pixels of shape (B, V, H, W).
        """
        rays = self.rays(c2w, fxfycxcy, size)
        flat = render_skipping(field, occupancies, rays, self.march, self.chunk_on(c2w.device))
        return flat.view((*c2w.shape[:2], *size))

    def chunk_on(self, device: torch.device) -> int:
        """Return the maximum number of points decoded at a time on a device."""
        return self.chunk or points_per_chunk(device)

    def rays(
        self, c2w: Tensor, fxfycxcy: Tensor, size: tuple[int, int], jitter: Tensor | None = None
    ) -> RayBundle:
        """Return the rays through all pixels of all views. The arguments are the same as in ``forward``."""
        with torch.autocast(c2w.device.type, enabled=False):
            origins, directions = pixel_rays(c2w.float(), fxfycxcy.float(), *size)
            near, far = ray_interval(origins, directions, self.bounds)
        noise = None if jitter is None else jitter.float().flatten(1)
        return RayBundle(
            origins.flatten(1, 3), directions.flatten(1, 3), near.flatten(1), far.flatten(1), noise
        )
