"""Tests that a killed and resumed run on CPUs equals the uninterrupted run bit by bit, with each value logged once."""

import os
import random
import re
import signal
import time

import fsspec
import pytest
import torch

from tests.runs import descendants, keep_every, kill

pytest_plugins = ["tests.servers.s3_store"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    # Sockets that the proxy breaks on purpose are left to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]

#: Number of steps of a run, with a checkpoint every five steps, validation and an average of the weights.
STEPS = 40
LONG = (
    f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=10",
    "--trainer.callbacks+=lrm_pl.training.ema.WeightAverage", "--trainer.callbacks.decay=0.9",
)  # fmt: skip
OFTEN = keep_every(5, keep=2)


@pytest.fixture(scope="module")
def whole(runs):
    """Run two processes without interruption as the reference; return its name."""
    runs.run("ddp-whole", 2, OFTEN, *LONG, layers=["ddp"])
    return "ddp-whole"


def survive(runs, name, processes, kills, seed, *options, layer, limit_s=240):
    """Kill a run several times at random moments after some steps; return the steps."""
    rng, killed_at = random.Random(seed), []
    for _ in range(kills):
        before = len(runs.log(name)) if (runs.folder / f"{name}.log").is_file() else 0
        process = runs.start(name, processes, OFTEN, *LONG, *options, layers=[layer])
        steps, deadline = rng.randint(0, STEPS // kills), time.monotonic() + limit_s
        while _steps(runs.log(name)[before:]) < steps and process.poll() is None:
            assert time.monotonic() < deadline, runs.log(name)[-4000:]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        kill(process)
        killed_at.append(_steps(runs.log(name)[before:]))
    runs.run(name, processes, OFTEN, *LONG, *options, layers=[layer], limit_s=limit_s)
    return killed_at


def _steps(log):
    """Return the number of steps in the progress bar, -1 without one."""
    return max(
        (int(step) for step in re.findall(r"\| (\d+)/\d+ \[.*loss", log)),
        default=0 if "Epoch 0" in log else -1,
    )


def same(runs, name, reference):
    """Check that tensors and run state are equal bit by bit, and that TensorBoard has each value once."""
    (checkpoint, tensors), (expected, theirs) = runs.final(name), runs.final(reference)
    assert checkpoint.step == expected.step == STEPS
    assert checkpoint.run == expected.run
    assert tensors.keys() == theirs.keys()
    assert any(key.startswith("average.") for key in tensors)
    assert [key for key in tensors if not torch.equal(tensors[key], theirs[key])] == []
    points, wanted = runs.scalars(name), runs.scalars(reference)
    assert points.keys() == wanted.keys()
    assert [tag for tag in points if points[tag] != wanted[tag]] == []
    assert [step for step, _ in points["loss/total"]] == list(range(1, STEPS + 1))


def test_a_killed_and_resumed_run_is_bitwise_equal_and_logs_every_step_once(runs, whole):
    survive(runs, "ddp-killed", 2, 1, 0, "--data.workers=1", layer="ddp")
    same(runs, "ddp-killed", whole)
    assert "Resuming after step" in runs.log("ddp-killed")


@pytest.mark.soak
def test_runs_that_are_killed_often_are_bitwise_equal_with_ddp_and_fsdp2(runs):
    print(
        f"\n{'strategy':<9} {'workers':>7} {'kills':>5}   same bits, same points; steps from each start to its kill"
    )
    for layer in ("ddp", "fsdp2"):
        runs.run(f"{layer}-reference", 2, OFTEN, *LONG, layers=[layer])
        for workers, kills in ((0, 7), (1, 7), (3, 6)):
            name = f"{layer}-{workers}-killed"
            moments = survive(runs, name, 2, kills, workers, f"--data.workers={workers}", layer=layer)
            same(runs, name, f"{layer}-reference")
            print(f"{layer:<9} {workers:>7} {kills:>5}   yes; {' '.join(map(str, moments))}")


def test_sigterm_saves_a_checkpoint_from_which_the_run_is_resumed(runs, whole):
    process = runs.start("told", 2, OFTEN, *LONG, "--data.workers=2", layers=["ddp"])
    deadline = time.monotonic() + 90
    while "step-00000005" not in str(list((runs.folder / "told").glob("checkpoints/*"))):
        assert time.monotonic() < deadline, runs.log("told")
        time.sleep(0.05)
    everyone = descendants(process.pid)
    assert len(everyone) == 10, "two ranks, each with two loader workers, what forks them, and its tracker"
    for pid in everyone:  # as Slurm does: every process of the step, not the launcher
        os.kill(pid, signal.SIGTERM)
    assert process.wait(60) != 0
    assert "stopped by a signal after step" in runs.log("told")
    stopped = runs.final("told")[0].step
    assert 5 <= stopped < STEPS
    runs.run("told", 2, OFTEN, *LONG, layers=["ddp"])
    assert f"Resuming after step {stopped} from" in runs.log("told")
    same(runs, "told", whole)


@pytest.mark.filterwarnings("default")
def test_sigusr1_in_slurm_saves_a_checkpoint_and_requests_a_requeue(runs, tmp_path, monkeypatch):
    note, asked = tmp_path / "note", tmp_path / "asked"
    stub = tmp_path / "scontrol"
    stub.write_text(f"#!/bin/sh\necho $@ >> {asked}\n")
    stub.chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "try", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0", "LRM_REQUEUE_NOTE": str(note), "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    options = (keep_every(2), f"--trainer.max_steps={STEPS}", "--data.workers=1")
    process = runs.start("slurm", 1, *options, layers=["cpu"], **slurm)
    deadline = time.monotonic() + 60
    while not list((runs.folder / "slurm").glob("checkpoints/step-*2")):
        assert time.monotonic() < deadline, runs.log("slurm")
        time.sleep(0.05)
    for pid in (process.pid, *descendants(process.pid)):
        os.kill(pid, signal.SIGUSR1)
    assert process.wait(60) == 75
    assert note.exists()
    stopped = runs.final("slurm")[0].step
    assert f"stopped by a signal after step {stopped}. The state was saved in" in runs.log("slurm")
    runs.run("slurm", 1, *options, layers=["cpu"], **slurm)
    assert f"Resuming after step {stopped} from" in runs.log("slurm")
    assert [step for step, _ in runs.scalars("slurm")["loss/total"]] == list(range(1, STEPS + 1))
    assert not asked.exists(), asked.read_text()
    assert not list((runs.folder / "slurm").rglob("hpc_ckpt*"))
    (runs.folder / "slurm" / "hpc_ckpt_1.ckpt").touch()
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="Lightning would automatically load the checkpoint"):
        runs.fit_here("slurm", *options)


@pytest.mark.soak
def test_a_killed_run_with_shards_in_a_faulty_object_store_equals_the_local_run(runs, whole, s3, tmp_path):
    fsspec.filesystem("s3").put(f"{runs.shards}/", "bucket/shards/", recursive=True)
    chance = random.Random(0)
    faults = ("503", "drop", "deaf", "cut", "slow")
    s3.fault = lambda method, path, number: chance.choice(faults) if chance.random() < 0.1 else None
    data = (
        "--data.folder=s3://bucket/shards", f"--data.cache.folder={tmp_path / 'cache'}", "--data.cache.attempts=10",
        "--data.workers=1",
    )  # fmt: skip
    survive(runs, "bucket", 2, 2, 0, *data, layer="ddp")
    same(runs, "bucket", whole)
    assert len(s3.broken) > 10
    assert len(list((tmp_path / "cache").glob("*.tar"))) >= 6
