"""Tests that metrics.csv has every value once after a kill and resume."""

import csv
import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KEEPER = {
    "class_path": "lrm_pl.training.checkpointing.CheckpointAndResume",
    "init_args": {"every": 5, "monitor": None},
}
METRICS = {"class_path": "lrm_pl.training.image_metrics.ImageMetricsLogger"}
KILL = {"class_path": "tests.distributed.stand_ins.KillAfterStep", "init_args": {"step": 8}}


def points(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row["step"]), name, value)
        for row in rows
        for name, value in sorted(row.items())
        if value and name not in ("step", "epoch")  # `epoch` comes with every row
    ]


@pytest.mark.soak
def test_metrics_csv_of_a_killed_and_resumed_run_equals_the_uninterrupted_run(runs, root):
    options = ["-c", root / "configs/logger/csv.yaml", "--trainer.max_steps=12"]

    def callbacks(*names):
        return f"--trainer.callbacks={json.dumps(names)}"

    runs.run("csv-whole", 1, *options, callbacks(KEEPER, METRICS), layers=["cpu"])
    runs.run("csv", 1, *options, callbacks(KEEPER, METRICS, KILL), layers=["cpu"], status=-9)
    before = points(runs.folder / "csv")
    assert max(step for step, _, _ in before) == 7, "later than the checkpoint of step 5"
    with open(runs.folder / "csv" / "metrics.csv", "a") as file:
        file.write("0,0.5")  # a row that was being written
    log = runs.run("csv", 1, *options, callbacks(KEEPER, METRICS), layers=["cpu"])
    assert "Resuming after step 5" in log
    found = points(runs.folder / "csv")
    assert len({(step, name) for step, name, _ in found}) == len(found)
    assert found == points(runs.folder / "csv-whole")


@pytest.mark.soak
def test_metrics_csv_is_restarted_without_a_checkpoint(runs, root):
    options = ["-c", root / "configs/logger/csv.yaml", "--trainer.max_steps=4"]
    kill = {**KILL, "init_args": {"step": 3}}
    runs.run("csv-early", 1, *options, f"--trainer.callbacks={json.dumps([kill])}", layers=["cpu"], status=-9)
    assert points(runs.folder / "csv-early")
    runs.run("csv-early", 1, *options, f"--trainer.callbacks={json.dumps([KEEPER])}", layers=["cpu"])
    steps = [step for step, name, _ in points(runs.folder / "csv-early") if name == "loss/total"]
    assert steps == [1, 2, 3, 4]
