"""Time and memory of a training step of OpenLRM-small, relative to a plain reimplementation of its code.

Batch 1, input of 224 px, trained encoder, 4 views, 96 samples per ray, MSE + TV, AdamW, bf16, random weights, no LPIPS.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from lrm_pl.geometry.cameras import orbit
from lrm_pl.geometry.rays import pixel_rays
from lrm_pl.inference.model_folder import build_network
from lrm_pl.losses.regularizers import total_variation
from lrm_pl.planning.memory import peak_memory
from lrm_pl.training.optim import OptimizerConfig
from lrm_pl.training.parallelize import ParallelConfig, prepare_blocks
from tests.bench.demo_run import ROOT
from tests.parity.openlrm import OpenLRM

#: Measured with OpenLRM's own code on two cores with AMX: seconds per step, GB.
SEEN = {64: (7.6, 5.7), 128: (39.0, 10.9)}
FASTER = {64: 2.0, 128: 3.0}
C2W, CAMERA = orbit(4, 2.2, 10.0)[None], torch.tensor([1.2, 1.2, 0.5, 0.5]).expand(1, 4, 4)


class Ours:
    """The training step of `lrm fit -c configs/model/NAME.yaml` with one object."""

    def __init__(self, name: str = "openlrm_small") -> None:
        config = yaml.safe_load((ROOT / f"configs/model/{name}.yaml").read_text())
        self.network, self.renderer = build_network(config)
        prepare_blocks(self.network, ParallelConfig(**config.get("parallel", {})))
        self.optimizer = OptimizerConfig().build(self.network)

    def pixels(self, size: int) -> tuple[Tensor, Tensor]:
        """Return 4 views (1, 4, size, size, 3) over white, and the planes."""
        side = self.network.encoder.image_size
        triplane = self.network(torch.rand(1, 1, 3, side, side), C2W[:, :1], CAMERA[:, :1])
        field, jitter = self.network.field(triplane), torch.rand(1, 4, size, size)
        return self.renderer(field, C2W, CAMERA, (size, size), jitter).over(torch.ones(3)), triplane.planes

    def loss(self, size: int, target: Tensor) -> Tensor:
        pixels, planes = self.pixels(size)
        return (pixels - target).square().mean() + 5e-4 * total_variation(planes)


class Twin:
    """The same step with plain PyTorch operators: planes repeated for each view, one graph of all samples."""

    def __init__(self) -> None:
        self.network = OpenLRM(384, 12, 6, 37, 1024, 512, 12, 8, 32, 32)
        nn.init.normal_(self.network.pos_embed, std=512**-0.5)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 4e-4)

    def loss(self, size: int, target: Tensor) -> Tensor:
        planes = self.network.planes(torch.rand(1, 3, 224, 224), torch.rand(1, 16))
        rays = (part.reshape(4, -1, 3) for part in pixel_rays(C2W, CAMERA, size, size))
        each = planes.float().repeat_interleave(4, dim=0)
        pixels, _ = self.network.render(each, *rays, 48, 48, torch.ones(3))
        return (pixels.view_as(target) - target).square().mean() + 5e-4 * total_variation(planes)


def main() -> None:
    """Run steps of one side and print their durations and the peak memory of the process."""
    side, size, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    run = Twin() if side == "twin" else Ours() if side == "ours" else Ours(side)
    target, times = torch.rand(1, 4, size, size, 3), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss(size, target)
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": times[1:], "peak_gb": peak_gb()}))


def peak_gb() -> float:
    """Return the peak memory of this process in GB."""
    return peak_memory(torch.device("cpu"))["memory/peak_host_gib"] * 2**30 / 1e9


def run_process(module: str, *arguments: object) -> dict:
    """Run a module of this package in a process and return the JSON on its last line."""
    command = [sys.executable, "-m", f"tests.bench.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(shards: Path, rounds: int) -> list[dict[str, object]]:
    """Run both sides alternately at both sizes."""
    results: list[dict[str, object]] = []
    for size in (64, 128):
        turns = [
            {side: run_process("steps", side, size, 2) for side in ("ours", "twin")} for _ in range(rounds)
        ]
        seconds, memory = (
            {side: statistics.median(f(turn[side]) for turn in turns) for side in ("ours", "twin")}
            for f in (lambda x: statistics.median(x["seconds"]), lambda x: x["peak_gb"])
        )
        ratio = seconds["twin"] / seconds["ours"]
        results.append({
            "bench": f"OpenLRM-small, training step at {size} px: speed relative to the reference implementation",
            "value": ratio, "target": f">= {FASTER[size]:g}", "met": ratio >= FASTER[size], "seconds": seconds,
            "peak_gb": memory, "openlrm_seen_seconds": SEEN[size][0], "openlrm_seen_gb": SEEN[size][1],
            "rounds": rounds,
        })  # fmt: skip
    for name, size, title in (
        ("small", 24, "model of the demo"),
        ("lrm", 128, "model of the LRM paper"),
    ):
        turn = run_process("steps", name, size, 2)
        results.append({
            "bench": f"{title}, training step with 4 views of {size} px: duration in seconds",
            "value": statistics.median(turn["seconds"]), "target": "-", "met": True,
            "peak_gb": turn["peak_gb"], "rounds": 1,
        })  # fmt: skip
    peak, seen = memory["ours"], SEEN[128][1]
    results.append({
        "bench": "OpenLRM-small, training step at 128 px: peak memory in GB", "value": peak,
        "target": f"<= {seen / 3:.2f}", "met": peak <= seen / 3, "twin": memory["twin"],
        "openlrm_seen": seen, "rounds": rounds,
    })  # fmt: skip
    return results


if __name__ == "__main__":
    main()
