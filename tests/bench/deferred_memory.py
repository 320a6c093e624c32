"""Peak memory of a training step of OpenLRM-small with LPIPS, for several sizes of the rendered image."""

import json
import sys
from pathlib import Path

import torch

from lrm_pl.weights.encoders import pretrained_perceptual_loss
from tests.bench.steps import Ours, peak_gb, run_process

SIZES = (64, 128, 256, 384)
TARGET = 1.2


def main() -> None:
    """Run two steps on 4 views of one size with LPIPS, and print the peak memory of the process."""
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
    """Measure each size in a separate process."""
    peaks = {f"{size}_px": run_process("deferred_memory", size)["peak_gb"] for size in SIZES}
    ratio = peaks["384_px"] / peaks["64_px"]
    return {
        "bench": "OpenLRM-small with LPIPS, training step: peak memory at 384 px relative to 64 px", "value": ratio,
        "target": f"<= {TARGET}", "met": ratio <= TARGET, "peak_gb": peaks, "rounds": 1,
    }  # fmt: skip


if __name__ == "__main__":
    main()
