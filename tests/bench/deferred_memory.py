"""(e) Peak memory of a step of OpenLRM-small with LPIPS, over the rendered area: it does not grow with it."""

import json
import sys
from pathlib import Path

import torch

from lrm_pl.weights.encoders import pretrained_perceptual_loss
from tests.bench.steps import Ours, in_a_process, peak_gb

SIZES = (64, 128, 256, 384)
TARGET = 1.2


def main() -> None:
    """Take two steps of 4 views of one size, LPIPS among the losses, and print the process's peak memory."""
    size = int(sys.argv[1])
    torch.manual_seed(0)
    run, lpips = Ours(), pretrained_perceptual_loss("vgg", source="pypi")
    target = torch.rand(4, 3, size, size)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            pixels = run.pixels(size)[0].flatten(0, 1).permute(0, 3, 1, 2)
            loss = (pixels - target).square().mean() + lpips(pixels, target).mean()
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    print(json.dumps({"peak_gb": peak_gb()}))


def measure(shards: Path, rounds: int) -> dict[str, object]:
    """Measure each size in a process of its own."""
    peaks = {f"{size}_px": in_a_process("deferred_memory", size)["peak_gb"] for size in SIZES}
    ratio = peaks["384_px"] / peaks["64_px"]
    return {
        "bench": "OpenLRM-small with LPIPS: peak memory at 384 px over that at 64 px", "value": ratio,
        "target": f"<= {TARGET}", "met": ratio <= TARGET, "peak_gb": peaks, "rounds": 1,
    }  # fmt: skip


if __name__ == "__main__":
    main()
