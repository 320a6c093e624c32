"""Time from an image to a density grid at TripoSR's size, relative to a plain reimplementation of its code.

Random weights and bf16 products. Both sides encode the same image. This package then queries a 256^3 grid coarse to
fine; the reimplementation queries every point of a 128^3 grid, 8192 at a time, and its time is multiplied by eight. The
queried field is that of a ball, because random weights give no empty space. Marching cubes, decimation, colors and GLB
are timed separately, and so is a grid of noise, which has no empty space to skip.
"""

from pathlib import Path

import torch
import yaml

from lrm_pl.inference.model_folder import build_network
from lrm_pl.inference.scene import reconstruct
from lrm_pl.meshing.glb import encode_glb
from lrm_pl.meshing.surface import extract_mesh
from lrm_pl.models.triplane import Triplane
from lrm_pl.progress import listening, stage
from lrm_pl.rendering.density_grid import density_grid, query_density
from tests.bench.components import TRIPOSR_LEVEL, Plain, ball, in_turns
from tests.bench.demo_run import ROOT
from tests.parity.triposr import RADIUS, TripoSR

#: Resolution of the grid of this package, and of the reimplementation.
OURS, THEIRS = 256, 128


@torch.no_grad()
def measure(shards: Path, rounds: int) -> list[dict[str, object]]:
    """Measure the forward pass and the grid of both sides, and the remaining stages of this package."""
    torch.manual_seed(0)
    network, renderer = build_network(yaml.safe_load((ROOT / "configs/model/triposr.yaml").read_text()))
    network.eval()
    twin = TripoSR(768, 12, 12, 14, 1024, 16, 16, 32, 40).eval()
    image = torch.rand(3, 512, 512)

    def their_forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return twin.planes(image[None])

    ahead, their_ahead = in_turns(lambda: reconstruct(network, renderer, image), their_forward, rounds)
    with torch.enable_grad():
        planes = ball(network.decoder)
    axis = torch.linspace(-1, 1, THEIRS)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(-1, 3)
    plain = Plain(planes)
    field = network.decoder.field(Triplane(planes, "triposr"))

    def their_grid() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain.query(points * RADIUS)

    grid, their_grid_seconds = in_turns(
        lambda: density_grid(field, 0, OURS, TRIPOSR_LEVEL), their_grid, rounds
    )
    their_grid_seconds *= (OURS / THEIRS) ** 3
    noise = network.decoder.field(Triplane(torch.randn(1, 3, 40, 64, 64), "triposr"))
    level = query_density(noise, 0, points[::97]).quantile(0.99).item()
    noise_grid, _ = in_turns(lambda: density_grid(noise, 0, OURS, level), lambda: None, 1)
    with listening() as after:
        mesh = extract_mesh(field, 0, TRIPOSR_LEVEL, OURS, max_faces=100_000)
        with stage("glb"):
            encode_glb(mesh)
    del after["grid"]
    share = (ahead + grid) / (their_ahead + their_grid_seconds)
    found: list[dict[str, object]] = [
        {
            "bench": "TripoSR, image to density grid of a ball: duration relative to the reference implementation",
            "value": share, "target": "<= 0.5", "met": share <= 0.5, "forward": ahead, "grid": grid,
            "plain_forward": their_ahead, "plain_grid": their_grid_seconds, "rounds": rounds,
        },
        {
            "bench": "TripoSR, image to density grid of a random triplane: duration relative to the "
            "reference implementation",
            "value": (ahead + noise_grid) / (their_ahead + their_grid_seconds), "target": "-", "met": True,
            "grid": noise_grid, "rounds": 1,
        },
    ]  # fmt: skip
    return found + [
        {
            "bench": f"TripoSR, mesh of a ball at grid resolution 256: duration of the '{name}' stage in seconds",
            "value": seconds, "target": "-", "met": True, "faces": len(mesh.faces), "rounds": 1,
        }
        for name, seconds in after.items()
    ]  # fmt: skip
