"""Tests of NaN on one rank: all ranks skip the step, and stop with a checkpoint if it persists."""

import math

import pytest
import torch

from tests.runs import keep_every

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def poison(first, last):
    return (
        "--trainer.callbacks+=tests.distributed.faults.Poison",
        f"--trainer.callbacks.first={first}", f"--trainer.callbacks.last={last}",
    )  # fmt: skip


@pytest.mark.parametrize("layer", [pytest.param("ddp", marks=pytest.mark.soak), "fsdp2"])
def test_all_ranks_skip_a_step_with_nan_on_one_rank(runs, layer):
    name = f"poisoned-{layer}"
    runs.run(name, 2, keep_every(1, 30), *poison(3, 3), "--trainer.max_steps=6", layers=[layer])
    points = runs.scalars(name)
    assert [value for _, value in points["optim/skipped_steps"]] == [0, 0, 0, 1, 1, 1]
    assert [math.isfinite(value) for _, value in points["loss/total"]] == [True] * 3 + [False] + [True] * 2
    states = [runs.at(name, step)[1] for step in (3, 4, 5)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), (
        "weights and moments are unchanged"
    )
    changed = [
        key
        for key in states[0]
        if key.startswith("network.") and not torch.equal(states[1][key], states[2][key])
    ]
    assert len(changed) > 50, "the next step is not skipped"
    assert all(torch.isfinite(tensor).all() for tensor in states[2].values())


@pytest.mark.filterwarnings("default")
def test_consecutive_bad_steps_stop_the_run_with_a_checkpoint_and_the_sample_ids(runs):
    # A checkpoint is being written while the ranks gather the sample ids.
    options = (keep_every(1), *poison(5, 99), "--model.guard.patience=3")
    log = runs.run("diverged", 2, *options, layers=["ddp"], status=1)
    assert "Expected finite gradients, but found 3 consecutive violations up to step 8" in log
    assert log.count("train-ellipsoid-") >= 4, "the four samples of the step, of both ranks"
    checkpoint, tensors = runs.final("diverged")
    assert checkpoint.step == 8
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    runs.fit_here("diverged", keep_every(100), "--trainer.max_steps=10")
    assert runs.final("diverged")[0].step == 10, "the run is resumed without the fault"


@pytest.mark.filterwarnings("default")
def test_divergence_in_the_last_steps_is_an_error(runs):
    options = (
        keep_every(100), *poison(5, 99), "--trainer.callbacks.rank=0", "--model.guard.patience=3",
        "--trainer.max_steps=8",
    )  # fmt: skip
    with pytest.raises(
        SystemExit, match="found 3 consecutive violations up to step 8, the last with norm nan"
    ):
        runs.fit_here("diverged-last", *options)
    assert runs.final("diverged-last")[0].step == 8
