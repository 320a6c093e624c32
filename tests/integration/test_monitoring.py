"""Monitoring of a run in this process: phases of a step, utilization, traces and logged files."""

import csv
import importlib.util
import json
import time

import pytest
import yaml

from lrm_pl.callbacks.step_timer import PHASES, StepTimer
from lrm_pl.cli.main import main
from lrm_pl.data.stream import TrainingStream
from lrm_pl.losses.objective import Objective
from lrm_pl.planning.simulate import StepCosts
from lrm_pl.rendering.renderer import Renderer
from lrm_pl.training.module import LRMModule
from tests.runs import RUN_CONFIG

# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")

QUICK = {
    **RUN_CONFIG,
    "trainer": {**RUN_CONFIG["trainer"], "max_steps": 6, "log_every_n_steps": 3, "val_check_interval": 3},
}
TIMER_ALONE = '--trainer.callbacks=[{"class_path": "lrm_pl.callbacks.step_timer.StepTimer"}]'


@pytest.fixture
def quick(tmp_path, shards, root):
    """Arguments of a run of six steps, logging to CSV in tmp_path/run."""
    (tmp_path / "quick.yaml").write_text(yaml.safe_dump(QUICK))
    return [
        "-c", str(tmp_path / "quick.yaml"), "-c", str(root / "configs/logger/csv.yaml"),
        "--data.folder", str(shards), "--run.folder", str(tmp_path / "run"),
    ]  # fmt: skip


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr("lrm_pl.cli.lightning_cli.print_report", lambda *_: {})


def lines(folder):
    """Return the rows of metrics.csv that the step timer has logged."""
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["time/step"]]


def slow(monkeypatch, owner, name, seconds):
    """Delay a method by a number of seconds."""
    original = getattr(owner, name)

    def slower(self, *arguments, **keywords):
        time.sleep(seconds)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(owner, name, slower)


def test_mfu_is_the_model_flops_divided_by_the_time_and_the_peak(quick, monkeypatch, tmp_path, no_report):
    monkeypatch.setattr("lrm_pl.callbacks.utilization.peak_flops", lambda _: 1e9)
    monkeypatch.setattr(
        StepCosts, "model_flops_of", lambda self, objects, pixels, *, lpips: 1000.0 * objects + pixels
    )
    main(["fit", *quick, TIMER_ALONE])
    for row in lines(tmp_path / "run"):
        pixels = RUN_CONFIG["data"]["batch_size"] * 2 * RUN_CONFIG["data"]["crop"]["size"] ** 2
        flops = 1000 * RUN_CONFIG["data"]["batch_size"] + pixels
        assert float(row["speed/mfu"]) == pytest.approx(
            flops / (float(row["time/step"]) / 1000) / 1e9, rel=1e-3
        )


def test_mfu_needs_a_known_peak_and_data_wait_needs_its_profiler(quick, monkeypatch, tmp_path, no_report):
    monkeypatch.setattr("lrm_pl.callbacks.utilization.peak_flops", lambda _: None)
    main(["fit", *quick, TIMER_ALONE, "--trainer.profiler=simple"])
    for row in lines(tmp_path / "run"):
        assert "speed/mfu" not in row
        assert float(row["time/data_wait"]) == 0 < float(row["time/other"])


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_phases_are_measured_separately_and_sum_to_the_step(
    quick, tmp_path, monkeypatch, no_report, accumulate
):
    # The simulation of a step for speed/mfu would take longer than the steps.
    monkeypatch.setattr("lrm_pl.callbacks.utilization.peak_flops", lambda _: None)
    ends, validations = [], []
    end_of_batch, validation = StepTimer.on_train_batch_end, LRMModule.validation_step
    monkeypatch.setattr(
        StepTimer,
        "on_train_batch_end",
        lambda self, *arguments: (ends.append(time.perf_counter()), end_of_batch(self, *arguments))[1],
    )

    def slow_validation(self, *arguments):
        began = time.perf_counter()
        time.sleep(0.2)
        result = validation(self, *arguments)
        validations.append(time.perf_counter() - began)
        return result

    monkeypatch.setattr(LRMModule, "validation_step", slow_validation)
    slow(monkeypatch, TrainingStream, "augment", 0.02)  # four a step
    slow(monkeypatch, Renderer, "forward", 0.06)
    slow(monkeypatch, Objective, "forward", 0.04)
    main([
        "fit", *quick, f"--trainer.accumulate_grad_batches={accumulate}",
        "--trainer.val_check_interval=3", TIMER_ALONE,
    ])  # fmt: skip
    first, second = lines(tmp_path / "run")
    for line in (first, second):
        parts = {part: float(line[f"time/{part}"]) for part in PHASES}
        step = float(line["time/step"])
        assert sum(parts.values()) == pytest.approx(step, rel=0.05)
        assert all(parts.values()), "no part was missed"
        assert parts["data_wait"] >= 4 * 20
        assert parts["renderer"] >= 60 * accumulate
        assert parts["losses"] >= 40 * accumulate
        assert float(line["speed/data_wait_fraction"]) == pytest.approx(parts["data_wait"] / step, rel=1e-3)
        assert float(line["speed/samples_per_second"]) == pytest.approx(4000 / step, rel=1e-3)
        rays = 4 * 2 * 16 * 16  # objects, views, pixels
        assert float(line["speed/rays_per_second"]) == pytest.approx(1000 * rays / step, rel=1e-3)
    # Another clock: from batch end to batch end, without the validation in between (which begins a little later).
    assert len(validations) == 2 * 6
    passed = ends[6 * accumulate - 1] - ends[3 * accumulate - 1] - sum(validations[:6])
    assert 0.6 * passed < 3 * float(second["time/step"]) / 1000 < passed


def test_hooks_and_the_clock_are_removed_after_training(quick, shards, monkeypatch, no_report):
    seen = []
    monkeypatch.setattr(LRMModule, "on_fit_end", lambda self: seen.append(self), raising=False)
    main(["fit", *quick, TIMER_ALONE])
    (module,) = seen
    assert type(module.renderer) is Renderer
    assert type(module.objective) is Objective
    assert not module.lrm.encoder._forward_pre_hooks
    assert not module.lrm.upsampler._forward_hooks
    assert module.trainer.profiler.clock is None


@pytest.mark.slow
def test_run_profile_writes_a_trace_with_the_operators_of_the_package(quick, tmp_path, caplog):
    caplog.set_level("INFO")
    main(
        ["fit", *quick, "--run.profile", "2", "--trainer.max_steps", "7", "--trainer.limit_val_batches", "0"]
    )
    path = tmp_path / "run" / "profile" / "rank0-steps-6-7.pt.trace.json"
    assert f"Wrote a trace of 2 steps to {path}. View the trace at https://ui.perfetto.dev" in caplog.text
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("_Deferred") == 2
    assert names.count("_DeferredBackward") == 2
    assert "lrm_pl::triplane_sample" in names


def test_run_profile_is_rejected_if_the_run_has_too_few_steps(quick):
    with pytest.raises(SystemExit, match=r"expected at least 7 steps .* found 6. Increase"):
        main(["fit", *quick, "--run.profile", "2"])


def test_images_config_and_report_are_written_without_tensorboard(quick, tmp_path):
    main(["fit", *quick, "--trainer.max_steps", "3"])
    folder = tmp_path / "run"
    for name in (
        "views/unseen-step000003.png",
        "views/heldout-step000003.png",
        "config.yaml",
        "commit.txt",
        "report.json",
    ):
        assert (folder / name).is_file()
    assert not list(folder.glob("events*"))
    with open(folder / "metrics.csv", newline="") as file:
        assert any(row["val/heldout/psnr_pooled"] for row in csv.DictReader(file))


def test_a_run_without_loggers_writes_only_to_its_folder(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", *quick, "--trainer.logger", "false", "--trainer.max_steps", "3"])
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert (tmp_path / "run" / "views" / "unseen-step000003.png").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"quick.yaml", "run"}


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_wandb_package_is_reported(quick, root):
    with pytest.raises(SystemExit, match=r"cannot create .*WandbLogger: Requirement 'wandb.*pip install"):
        main(["fit", *quick, "-c", str(root / "configs/logger/wandb.yaml")])
