"""Compare the kernels of the fused decoder, run by Triton's interpreter in float32, with the reference implementation.

``TRITON_INTERPRET=1 python -m tests.fused.interpreted`` prints a line per case, and fails if a difference exceeds 1e-5.
It runs in a separate process because the interpreter must be selected before Triton is imported.
"""

import itertools
import sys

import torch

from lrm_pl.conventions import PLANE_AXES
from lrm_pl.geometry.cameras import orbit
from lrm_pl.kernels import decode_along_rays as fused
from lrm_pl.kernels import device
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.triplane import Triplane
from lrm_pl.rendering.renderer import Renderer

BOUND = 1e-5


def case(
    side,
    width,
    layers,
    act,
    layout,
    tile,
    *,
    views=1,
    size=8,
    samples=8,
    distance=2.37,
    stretch=1.0,
    programs=3,
):
    """Compare values and all gradients of one case with the project's decoder.

    Args:
        side: Side length S of the planes.
        width: Width C of the decoder.
        layers: Number of linear layers of the decoder.
        act: Activation.
        layout: Orientation of the planes.
        tile: Number of rows, columns and samples of a tile.
        views: Number of cameras on an orbit.
        size: Side length of the images.
        samples: Number K of samples per ray.
        distance: Distance of the cameras. Rays through the corners of the image miss the sphere.
        stretch: Factor of the sample distances. If it exceeds 1, samples are outside the planes.
        programs: Number of programs.

    Returns:
        Relative differences of the values, of the gradient of the planes, and of the gradients of weights and biases.
    """
    torch.manual_seed(0)
    decoder = NeRFDecoder(channels=5, width=width, layers=layers, activation=act)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    planes = torch.randn(1, 3, 5, side, side)
    field = decoder.field(Triplane(planes, layout))
    cameras = torch.tensor([1.07, 1.07, 0.5, 0.5]).expand(1, views, 4)
    rays = Renderer(samples).rays(orbit(views, distance)[None], cameras, (size, size))
    origins, directions, near, far = (
        x[0].unflatten(0, (views * size, size)) for x in (rays.origins, rays.directions, rays.near, rays.far)
    )
    alive = far > near
    t = (
        near[..., None]
        + (torch.arange(samples) + torch.rand(views * size, size, 1)) / samples * (far - near)[..., None]
    )
    fused.TILES = {torch.float32: (tile,)}
    device._INTERPRETED = device._INTERPRETED._replace(multiprocessors=programs)
    mlp = fused.pack(field.weights, torch.float32)
    samples_along_rays = fused.RaySamples(origins, directions, stretch * t, alive)
    given = (field.planes[0].detach(), samples_along_rays, mlp, PLANE_AXES[layout], act)
    grad = torch.randn(*t.shape, 4)

    leaves = field.planes.detach()[0].requires_grad_(), *(w.detach().requires_grad_() for w in field.weights)
    points = (origins.unsqueeze(-2) + samples_along_rays.t.unsqueeze(-1) * directions.unsqueeze(-2)).view(
        -1, 3
    )
    expected = decoder.mlp(field.sample(leaves[0], points), leaves[1:]).view(*t.shape, 4)
    gradients = torch.autograd.grad(expected[alive], leaves, grad[alive])

    total = torch.zeros_like(given[0])
    found = fused.decode_along_rays(*given)
    sums = fused.unpack(fused.accumulate_gradient(total, grad, *given), width)
    nothing = torch.tensor([fused.EMPTY_RAW_DENSITY, 0, 0, 0]).expand(samples, 4)
    assert (found[~alive] == nothing).all()
    pairs = zip((found[alive], total, *sums), (expected[alive].detach(), *gradients), strict=True)
    return [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs]


def cases():
    """Yield the test cases: all pairs of values, and special cases."""
    defaults = {"side": 16, "width": 16, "layers": 3, "act": "relu", "layout": "lrm", "tile": (4, 4, 4)}
    choices = {
        "side": (8, 16), "width": (16, 32, 64), "layers": (2, 3, 5, 10), "act": ("relu", "silu"),
        "layout": ("lrm", "openlrm", "triposr"), "tile": ((4, 4, 4), (2, 4, 8), (8, 8, 2), (4, 4, 8)),
    }  # fmt: skip
    seen = []
    for (first, some), (second, others) in itertools.combinations(choices.items(), 2):
        for a, b in zip(itertools.cycle(some), others, strict=False):
            seen.append(defaults | {first: a, second: b})
    seen += [
        defaults | {"views": 3},  # several views in one grid
        defaults | {"size": 6, "samples": 5},  # not a multiple of the tile
        defaults | {"distance": 6.0},  # most rays miss, so that whole tiles are empty
        defaults | {"stretch": 3.0},  # points outside the planes
        defaults | {"programs": 1},
        defaults | {"tile": (8, 8, 4), "samples": 4, "side": 64},  # a tile larger than a window of texels
    ]
    unique = {repr(sorted(one.items())): one for one in seen}
    return list(unique.values())


def main():
    torch.set_num_threads(1)
    table, wrong = cases(), 0
    for one in table:
        with device.as_accelerator():
            found = case(**one)
        wrong += not max(found) <= BOUND
        values, planes, *weights = found
        print(
            f"{one}: values {values:.0e}, planes {planes:.0e}, weights and biases {max(weights):.0e}",
            flush=True,
        )
    print(f"{len(table) - wrong} passed, {wrong} failed")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
