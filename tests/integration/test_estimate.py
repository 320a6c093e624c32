"""Tests of `lrm estimate` in comparison with runs, and of the message for out-of-memory errors."""

import csv
import dataclasses
import os
import re
import resource
import shlex
import subprocess
import sys

import pytest
import yaml

from lrm_pl.apps.estimate import main as estimate
from lrm_pl.planning.gpus import require_gpu
from tests.builders import TINY, cells

# LightningCLI uses names that jsonargparse has deprecated.
pytestmark = pytest.mark.filterwarnings("default")

#: Big enough that a step shows beside Python and its libraries, small enough for seconds.
MIDDLE = {
    **TINY,
    "model": {
        **TINY["model"],
        "lrm": {
            "encoder": {"name": "vit_small_patch14_dinov2", "image_size": 112, "frozen": False},
            "decoder": {"channels": 16, "width": 32, "layers": 4}, "dim": 384, "depth": 6, "heads": 6,
            "camera_dim": 256, "plane_tokens": 24, "upsample": 2,
        },
        "renderer": {"samples_per_ray": 16},
    },
    "data": {**TINY["data"], "batch_size": 2, "side_views": 3},
    "trainer": {
        "accelerator": "cpu", "max_steps": 2, "log_every_n_steps": 1, "limit_val_batches": 0,
        "callbacks": [{"class_path": "lrm_pl.callbacks.step_timer.StepTimer"}],
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "m"},
        },
    },
}  # fmt: skip

SHALLOW = ("--model.lrm.depth=2", "--model.lrm.encoder.depth=2")


@pytest.fixture
def middle(tmp_path):
    (tmp_path / "middle.yaml").write_text(yaml.safe_dump(MIDDLE))
    return str(tmp_path / "middle.yaml")


def fit(arguments, limit=None):
    """Run `lrm fit` in a process with a memory limit in bytes."""
    command = [sys.executable, "-m", "lrm_pl", "fit", *arguments]
    limits = (
        {}
        if limit is None
        else {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit,) * 2)}
    )
    return subprocess.run(command, capture_output=True, text=True, timeout=250, env=os.environ, **limits)


def peak_in_training(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return max(float(row["memory/peak_host_gib"] or 0) for row in csv.DictReader(file)) * 2**30


@pytest.mark.slow
def test_the_estimated_memory_of_a_run_is_accurate_to_15_percent(middle, shards, tmp_path):
    # A new process is required because the memory of Python and the libraries is part of the estimate.
    output = subprocess.run(
        [sys.executable, "-m", "lrm_pl", "estimate", middle],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    done = fit(["-c", middle, "--data.folder", str(shards), "--run.folder", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr[-3000:]
    estimated = cells(output.stdout, "cpu")[4] * 1e9
    assert estimated == pytest.approx(peak_in_training(tmp_path / "run"), rel=0.15)


@pytest.mark.slow
def test_an_out_of_memory_error_prints_the_estimate_command(middle, shards, tmp_path, capsys):
    arguments = ["-c", middle, "--data.folder", str(shards), "--data.batch_size", "4"]
    done = fit([*arguments, "--run.folder", str(tmp_path / "run")], limit=2_200_000_000)
    assert done.returncode == 1
    assert "lrm: out of memory:" in done.stderr
    assert "Traceback" not in done.stderr
    lrm, command, *typed = shlex.split(done.stderr.rstrip().splitlines()[-1])
    assert (lrm, command) == ("lrm", "estimate")
    estimate(typed)
    output = capsys.readouterr().out
    now = float(re.search(r"estimated: ([\d.]+) GB per process\. Settings that reduce it most:", output)[1])
    remedies = re.findall(r"^  (--\S+) +([\d.]+) GB  \((.+)\)$", output, re.MULTILINE)
    assert len(remedies) == 3
    assert all(float(less) < now for _, less, _ in remedies)
    assert "--trainer.accumulate_grad_batches=2" in [option for option, _, _ in remedies]


def test_an_estimate_for_many_gpus_recommends_a_strategy(middle, capsys):
    estimate(
        [middle, *SHALLOW, "--gpus", "8", "--gpus-per-node", "4", "--every-rank", "--data.batch_size", "16"]
    )
    output = capsys.readouterr().out
    assert "fsdp2: checked the shards of 8 of 8 processes" in output
    assert "hsdp: checked the shards of 8 of 8 processes" in output
    ddp, fsdp2, hsdp = (cells(output, name) for name in ("ddp", "fsdp2", "hsdp"))
    assert ddp[0] > hsdp[0] >= fsdp2[0]  # weights
    assert ddp[2] > hsdp[2] >= fsdp2[2]  # moments
    assert re.search(r"To start the run: make train NODES=2 GPUS=4 STRATEGY=\w+ CONFIG=", output)
    assert "Times are estimated, not measured" in output
    best = re.search(
        r"Recommended: (\w+), .*; ([\d.]+)-([\d.]+) s per step, MFU ([\d.]+)-([\d.]+) \(estimated, not",
        output,
    )
    assert float(best[2]) < float(best[3])
    row = next(line for line in output.splitlines() if line.startswith(f"│ {best[1]} "))
    assert re.search(r"│ +[\d.]+-[\d.]+ │ +[\d.]+(-[\d.]+)? │ +[\d.]+-[\d.]+ (s|min|h) │$", row)


def test_the_operations_of_the_parts_sum_to_the_total(middle, capsys):
    estimate([middle])
    output = capsys.readouterr().out
    forward = {
        name: cells(output, f"forward, {name}")[-1]
        for name in ("encoder", "transformer", "renderer", "losses")
    }
    both = cells(output, "forward + backward")[-1]
    assert both == pytest.approx(3 * sum(forward.values()), rel=0.01)
    assert cells(output, "executed, with recomputation")[-1] > both


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpus", "3"],
            "divisible by 3 processes times 1 accumulated batches, but found 2",
        ),
        (
            ["--gpus", "12", "--data.batch_size", "12"],
            "expected a multiple of 8 GPUs, the number per node, but found 12 GPUs",
        ),
        (["--gpus", "2", "--trainer.precision", "64-true"], "expected trainer.precision bf16-mixed"),
        (["--model.lrm.width", "3"], "expected valid arguments of `lrm fit`"),
        (["--gpus", "-1"], "--gpus must be at least 0"),
        (["--gpus", "8", "--network", "nan"], "--network greater than 0"),
        (
            ["--gpus", "1", "--data.crop.size", "8", "--model.objective.lpips", "1"],
            "crops of at least 16 pixels for LPIPS, but found 8",
        ),
        (["--gpus", "1", "--gpu", "4090x"], "found '4090x'. Use a name such as GeForce RTX 4090"),
        (
            ["--gpus", "1", "--gpu", "t4", "--trainer.precision", "bf16-mixed"],
            "Use --trainer.precision 16-mixed",
        ),
    ],
)
def test_invalid_arguments_are_rejected_with_a_remedy(middle, arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        estimate([middle, *arguments])


@pytest.mark.parametrize(
    ("precision", "optimizer"), [("bf16-mixed", "Fused AdamW"), ("16-mixed", "Foreach AdamW")]
)
def test_the_fused_optimizer_is_estimated_only_if_the_run_uses_it(middle, capsys, precision, optimizer):
    estimate([middle, *SHALLOW, "--gpus", "1", "--gpu", "4090", "--trainer.precision", precision])
    output = capsys.readouterr().out
    assert optimizer in output
    assert "1 x GeForce RTX 4090 in 1 node;" in output


def test_the_fraction_of_hit_rays_is_measured_on_available_data(middle, shards, capsys):
    estimate([middle, *SHALLOW, "--data.folder", str(shards)])
    output = capsys.readouterr().out
    assert "(cameras of 4 training objects)" in output
    assert output.splitlines()[-1].startswith(f'To start the run: make train CONFIG="{middle}"'), (
        "on CPUs, too"
    )


def test_settings_with_less_memory_are_listed_for_a_small_gpu(middle, capsys, monkeypatch):
    small = dataclasses.replace(require_gpu("l4"), memory=0.7e9)
    monkeypatch.setattr("lrm_pl.apps.estimate.require_gpu", lambda _: small)
    estimate([middle, *SHALLOW, "--gpus", "1", "--gpu", "l4"])
    output = capsys.readouterr().out
    assert "too much" in output
    assert "No strategy fits into memory." in output
    assert output.count(" GB  (") == 3
