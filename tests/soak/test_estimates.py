"""Estimates against real runs: peak memory of `lrm fit` on this machine's CPU, from the demo to the paper's size."""

import csv
import subprocess
import sys

import pytest

from lrm_pl.data.synthetic import write_synthetic_shards
from tests.builders import cells

SMALL_WINDOWS = "--data.crop={low: 64, high: 128, size: 64}"

CASES = {
    "demo": ["-c", "configs/experiment/demo.yaml"],
    "demo with LPIPS": ["-c", "configs/experiment/demo.yaml", "--model.objective.lpips_start_step=0"],
    "openlrm_small": ["--model=configs/model/openlrm_small.yaml", "--data.batch_size=1", SMALL_WINDOWS],
    "openlrm_small, 128 px": ["--model=configs/model/openlrm_small.yaml", "--data.batch_size=1"],
    "openlrm_small, 2 x 2 objects": [
        "--model=configs/model/openlrm_small.yaml", "--data.batch_size=4", "--trainer.accumulate_grad_batches=2",
        SMALL_WINDOWS,
    ],
    "openlrm_small, recomputed": [
        "--model=configs/model/openlrm_small.yaml", "--data.batch_size=2",
        "--model.parallel.activation_checkpointing_every=1",
        SMALL_WINDOWS,
    ],
    "openlrm_base": ["--model=configs/model/openlrm_base.yaml", "--data.batch_size=1", SMALL_WINDOWS],
    "lrm": ["--model=configs/model/lrm.yaml", "--data.batch_size=1", SMALL_WINDOWS],
    "triposr": ["--model=configs/model/triposr.yaml", "--data.batch_size=1", SMALL_WINDOWS],
}  # fmt: skip

TIMER = "--trainer.callbacks=[lrm_pl.callbacks.step_timer.StepTimer]"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight objects, 8 views of 128 x 128."""
    folder = tmp_path_factory.mktemp("images")
    write_synthetic_shards(folder, train=8, val=1, views=8, resolution=128, shard_size=8)
    return folder


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_the_estimated_memory_is_within_15_percent_of_a_real_run(case, images, tmp_path, root):
    def run(command, *arguments):
        line = [sys.executable, "-m", "lrm_pl", command, *CASES[case], *arguments]
        return subprocess.run(line, cwd=root, capture_output=True, text=True, timeout=800, check=True).stdout

    estimated = cells(run("estimate"), "cpu")[4]
    run(
        "fit", "-c", "configs/logger/csv.yaml", "--data.folder", str(images), "--weights.pretrained=false",
        "--weights.source=pypi", "--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--data.workers=0",
        "--data.input_pool=null", "--trainer.limit_val_batches=0", "--run.folder", str(tmp_path / "run"), TIMER,
    )  # fmt: skip
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        peaks = [float(row["memory/peak_host_gib"] or 0) for row in csv.DictReader(file)]
    measured = max(peaks) * 2**30 / 1e9
    print(
        f"\n{case}: estimated {estimated:.2f} GB, measured {measured:.2f} GB, {estimated / measured - 1:+.1%}"
    )
    assert estimated == pytest.approx(measured, rel=0.15)
