"""Encoder, transformer, renderer, grid queries and marching cubes, with random weights and bf16 products."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from skimage.measure import marching_cubes
from torch import Tensor
from torch.nn import functional as F

from lrm_pl.geometry.cameras import orbit
from lrm_pl.geometry.rays import pixel_rays
from lrm_pl.meshing.surface import extract_mesh
from lrm_pl.models.decoder import NeRFDecoder
from lrm_pl.models.encoder import ImageEncoder
from lrm_pl.models.transformer import TriplaneTransformer
from lrm_pl.models.triplane import Triplane
from lrm_pl.planning.gpus import cpu_flops
from lrm_pl.rendering.density_grid import density_grid, query_density
from lrm_pl.rendering.empty_space import measure_occupancy
from lrm_pl.rendering.renderer import Renderer
from tests.bench.demo_run import ROOT
from tests.parity.triposr import RADIUS, TripoSR

#: Measured with TripoSR's own code on two cores with AMX: 2.1 million grid points in 1.5 s; an image of 128 x 128
#: rays of 128 samples in 1.3 s.
TRIPOSR_POINTS, TRIPOSR_SAMPLES = 2.1e6 / 1.5, 128**3 / 1.3
#: TripoSR's density threshold for marching cubes.
TRIPOSR_LEVEL = 25.0


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median duration of a function after one warm-up call."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median durations of two functions that alternate, after one warm-up call each."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for work, spent in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            work()
            if number:
                spent.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def block_flops(length: int, dim: int, image_tokens: int, image_dim: int) -> int:
    """Return the FLOPs of the matrix products of one block's forward pass: linear layers and attention."""
    linear = 2 * length * dim * dim * (3 + 1 + 1 + 1 + 8) + 2 * image_tokens * image_dim * 2 * dim
    return linear + 4 * length * length * dim + 4 * length * image_tokens * dim


def transformer(rounds: int) -> list[dict[str, object]]:
    """Run two blocks of the paper's width, forward and backward."""
    depth, length, dim = 2, 3072, 1024
    network = TriplaneTransformer(length, dim, depth, 16, 768, 1024)
    image, camera = torch.randn(1, 1025, 768), torch.randn(1, 1024)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = network(image, camera).float().square().mean()
        loss.backward()

    peak, taken = cpu_flops(), seconds(step, rounds)
    flops = 3 * depth * block_flops(length, dim, 1025, 768)
    share = flops / taken / peak
    return [{
        "bench": "transformer of the LRM paper, forward and backward: fraction of the peak bf16 FLOPS", "value": share,
        "target": ">= 0.4", "met": share >= 0.4, "ms_a_block": 1e3 * taken / depth, "gflops": flops / taken / 1e9,
        "peak_gflops": peak / 1e9, "bound_by": "products and softmax of attention's scores, twice in backward",
        "rounds": rounds,
    }]  # fmt: skip


def encoder(rounds: int) -> list[dict[str, object]]:
    """Run the paper's encoder on one image."""
    network, image = ImageEncoder("vit_base_patch16_224.dino", 512), torch.rand(1, 3, 512, 512)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(image)

    forward_only = torch.no_grad()(forward)
    ahead, both = seconds(forward_only, rounds), seconds(lambda: forward().float().mean().backward(), rounds)
    return [{
        "bench": "encoder (ViT-B/16, 512 px), forward and backward: duration in seconds", "value": both,
        "target": "-", "met": True, "forward": ahead, "rounds": rounds,
    }]  # fmt: skip


def _decoder(name: str) -> tuple[NeRFDecoder, Renderer, dict]:
    config = yaml.safe_load((ROOT / f"configs/model/{name}.yaml").read_text())
    return NeRFDecoder(**config["lrm"]["decoder"]), Renderer(**config["renderer"]), config["lrm"]


def renderer(rounds: int) -> list[dict[str, object]]:
    """Render 4 views of 64 x 64 at the sizes of OpenLRM-small and the paper, forward, then with backward."""
    results: list[dict[str, object]] = []
    c2w, camera = orbit(4, 2.2, 10.0)[None], torch.tensor([1.2, 1.2, 0.5, 0.5]).expand(1, 4, 4)
    for name in ("openlrm_small", "lrm"):
        decoder, render, _ = _decoder(name)
        planes = torch.randn(1, 3, decoder.channels, 64, 64, requires_grad=True)

        def forward(
            decoder: NeRFDecoder = decoder, render: Renderer = render, planes: Tensor = planes
        ) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                field = decoder.field(Triplane(planes))
                return render(field, c2w, camera, (64, 64), torch.rand(1, 4, 64, 64)).rgb

        samples = 4 * 64 * 64 * render.march.samples
        ahead = samples / seconds(torch.no_grad()(forward), rounds)
        both = samples / seconds(lambda forward=forward: forward().square().mean().backward(), rounds)
        width = decoder.layers[0].out_features
        results.append({
            "bench": f"renderer ({name}.yaml), forward and backward: million samples per second", "value": both / 1e6,
            "target": "-", "met": True, "forward": ahead / 1e6,
            # Twelve neighbors are read of the folded planes, and hidden layers are written and read in bf16.
            "bytes_a_sample_forward": 12 * width * 4 + 4 * width * len(decoder.layers),
            "bound_by": "reads of planes that are larger than the L2 cache, then the MLP's products", "rounds": rounds,
        })  # fmt: skip
    return results


class Plain:
    """Plain reimplementation of TripoSR's queries and rendering in chunks of 8192 points, as in its own code."""

    def __init__(self, planes: Tensor) -> None:
        self.network, self.planes = TripoSR(channels=planes.shape[2]), planes

    def query(self, points: Tensor) -> Tensor:
        """Return the densities at points (Q, 3)."""
        return torch.cat(
            [self.network.query(self.planes, part[None])[0] for part in points.split(8192)], dim=1
        )

    def image(self, origins: Tensor, directions: Tensor, samples: int) -> Tensor:
        """Render rays (1, R, 3)."""
        pairs = zip(*(x.split(8192 // samples, dim=1) for x in (origins, directions)), strict=True)
        return torch.cat([self.network.render(self.planes, *pair, samples) for pair in pairs], dim=1)


def ball(decoder: NeRFDecoder) -> Tensor:
    """Fit planes and decoder to a ball of radius 1/2, which fills a fifteenth of the box."""
    planes = torch.zeros(1, 3, decoder.channels, 64, 64, requires_grad=True)
    optimizer = torch.optim.Adam([planes, *decoder.parameters()], 5e-3)
    for _ in range(150):
        points = torch.rand(16384, 3) * 2 - 1
        field = decoder.field(Triplane(planes, "triposr"))
        raw, _ = field.decode(field.sample(field.planes[0], points), field.weights)
        # Densities are exponentials: invisible outside (e^-12), opaque inside (e^5).
        wanted = torch.where(points.norm(dim=-1) < 0.5, 6.0, -11.0)
        optimizer.zero_grad()
        F.smooth_l1_loss(raw, wanted).backward()
        optimizer.step()
    return planes.detach()


@torch.no_grad()
def queries(rounds: int) -> list[dict[str, object]]:
    """Query a grid, render an image and extract a mesh at TripoSR's size, alternating with the reimplementation."""
    decoder, render, _ = _decoder("triposr")
    axis = torch.linspace(-1, 1, 128)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(-1, 3)
    c2w, camera = orbit(1, 2.2)[None], torch.tensor([1.37, 1.37, 0.5, 0.5])[None, None]
    planes = torch.randn(1, 3, 40, 64, 64)
    plain = Plain(planes)
    theirs = [
        x.flatten(1, 3) * RADIUS**k for x, k in zip(pixel_rays(c2w, camera, 128, 128), (1, 0), strict=True)
    ]

    def queried() -> Tensor:
        return plain.query(points * RADIUS)

    def rendered() -> Tensor:
        return plain.image(*theirs, render.march.samples)

    with torch.autocast("cpu", torch.bfloat16):
        field = decoder.field(Triplane(planes, "triposr"))
        occupancy = measure_occupancy(field, 0)
        grid = in_turns(lambda: query_density(field, 0, points), queried, rounds)
        drawn = in_turns(
            lambda: render.draw(field, [occupancy], c2w, camera, (128, 128)), rendered, rounds
        )  # fmt: skip
        level = query_density(field, 0, points[::97]).quantile(0.99).item()
        mesh = seconds(lambda: extract_mesh(field, 0, level, 384), 1)
        density = density_grid(field, 0, 384, level).numpy()
        cubes = seconds(lambda: marching_cubes(density, level), 1)
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            planes = ball(decoder)
        thing = decoder.field(Triplane(planes, "triposr"))
        around = measure_occupancy(thing, 0)
        thing_grid = in_turns(lambda: density_grid(thing, 0, 128, TRIPOSR_LEVEL), queried, rounds)
        thing_drawn = in_turns(
            lambda: render.draw(thing, [around], c2w, camera, (128, 128)), rendered, rounds
        )
        thing_mesh = seconds(lambda: extract_mesh(thing, 0, TRIPOSR_LEVEL, 384), 1)
    found: list[dict[str, object]] = []
    for where, share, (mine, other), (image, other_image) in (
        ("a random triplane", occupancy.fraction, grid, drawn),
        ("a ball", around.fraction, thing_grid, thing_drawn),
    ):
        for what, unit, number, seen, ours, twin in (
            ("density grid", "points", len(points), TRIPOSR_POINTS, mine, other),
            ("image", "samples", 128**3, TRIPOSR_SAMPLES, image, other_image),
        ):
            rate, common = number / ours, {"occupied": share, "rounds": rounds}
            found += [
                {
                    "bench": f"TripoSR, {what} of {where}: million {unit} per second", "value": rate / 1e6,
                    "target": f">= {3 * seen / 1e6:.1f}", "met": rate >= 3 * seen, "triposr_seen": seen / 1e6,
                    "bound_by": "ten layers of 64: products and SiLU", **common,
                },
                {
                    "bench": f"TripoSR, {what} of {where}: speed relative to the reference implementation",
                    "value": twin / ours, "target": ">= 3", "met": twin >= 3 * ours, "seconds": ours,
                    "plain_seconds": twin, **common,
                },
            ]  # fmt: skip
    for name, taken in (
        ("TripoSR, mesh of a random triplane at grid resolution 384: duration in seconds", mesh),
        ("TripoSR, mesh of a ball at grid resolution 384: duration in seconds", thing_mesh),
        ("marching cubes for a random triplane at grid resolution 384: duration in seconds", cubes),
    ):
        found.append({"bench": name, "value": taken, "target": "-", "met": True, "rounds": 1})
    return found


def measure(shards: Path, rounds: int) -> list[dict[str, object]]:
    """Measure all components."""
    torch.manual_seed(0)
    parts = (encoder, transformer, renderer, queries)
    return [result for part in parts for result in part(rounds)]
