"""Tests of a full disk: checkpoints are written to a tmpfs with room for one or two of them."""

import json
import shlex
import subprocess
import sys

import pytest

from tests import ROOT
from tests.runs import keep_every

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: A mount namespace of its own: no right is needed that a user does not have, and nothing is left behind.
OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")


@pytest.mark.parametrize(
    ("layer", "processes"), [("cpu", 1), pytest.param("fsdp2", 2, marks=pytest.mark.soak)]
)
def test_a_run_on_a_full_disk_stops_and_is_resumed_once_there_is_space(runs, layer, processes):
    tried = subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False)
    if tried.returncode:
        pytest.skip("needs user namespaces, in which a small disk can be mounted")
    folder = runs.folder / f"full-{layer}"
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes}" if processes > 1 else ""
    run = (
        f"{sys.executable} {launcher} -m lrm_pl fit -c {runs.folder}/tiny.yaml -c configs/trainer/{layer}.yaml "
        f"--data.folder {runs.shards} --trainer.devices {processes} --run.folder {folder} "
        f"{shlex.quote(keep_every(5))}"
    )
    script = f"""
        mount -t tmpfs -o size=10m tmpfs {checkpoints}
        {run} > {folder}/first.log 2>&1; echo $? > {folder}/status
        ls {checkpoints} > {folder}/left
        mount -o remount,size=100m {checkpoints}
        {run} > {folder}/second.log 2>&1
    """
    second = subprocess.run([*OWN_MOUNTS, "sh", "-c", script], cwd=ROOT, timeout=280, check=False)
    first = (folder / "first.log").read_text()
    assert (folder / "status").read_text().strip() == "1", first[-4000:]
    assert f"A checkpoint could not be written to {checkpoints} (detected at step" in first
    assert "[Errno 28] No space left" in first
    *_, newest = [name for name in (folder / "left").read_text().split() if "partial" not in name]
    step = int(newest.removeprefix("step-"))
    assert step in (5, 10), "a rank's file takes more room than its tensors"
    assert (
        f"The newest complete checkpoint is {checkpoints}/{newest}. Free some space and run the same command"
        in first
    )
    assert second.returncode == 0, (folder / "second.log").read_text()[-4000:]
    assert f"Resuming after step {step} from {checkpoints}/{newest}" in (folder / "second.log").read_text()
    assert [step for step, _ in runs.scalars(f"full-{layer}")["loss/total"]] == list(range(1, 21))


@pytest.mark.soak
def test_a_disk_full_of_logs_ends_a_run_with_one_message(runs):
    tried = subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False)
    if tried.returncode:
        pytest.skip("needs user namespaces, in which a small disk can be mounted")
    folder = runs.folder / "full-of-logs"
    folder.mkdir()
    keeper = {
        "class_path": "lrm_pl.training.checkpointing.CheckpointAndResume",
        "init_args": {"every": 5, "folder": str(runs.folder / "roomy")},
    }
    callbacks = shlex.quote(f"--trainer.callbacks+={json.dumps(keeper)}")
    run = (
        f"{sys.executable} -m lrm_pl fit -c {runs.folder}/tiny.yaml --data.folder {runs.shards} --data.workers 2 "
        f"--trainer.val_check_interval 1 --run.folder {folder} {callbacks}"
    )
    log = runs.folder / "full-of-logs.log"
    script = f"mount -t tmpfs -o size=40k tmpfs {folder}; {run} > {log} 2>&1"
    done = subprocess.run([*OWN_MOUNTS, "sh", "-c", script], cwd=ROOT, timeout=200, check=False)
    said = log.read_text()
    assert done.returncode == 1, said[-4000:]
    assert "lrm: no space left for files of the run: [Errno 28] No space left on device" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ("64k", "/dev/shm is full"),
        pytest.param(
            "16k", "found [Errno 28] No space left on device", marks=pytest.mark.soak
        ),  # no queue either
    ],
)
def test_full_shared_memory_ends_a_run_with_one_message(runs, size, found):
    tried = subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False)
    if tried.returncode:
        pytest.skip("needs user namespaces, in which a small disk can be mounted")
    run = (
        f"{sys.executable} -m lrm_pl fit -c {runs.folder}/tiny.yaml --data.folder {runs.shards} --data.workers 1 "
        f"--run.folder {runs.folder}/full-memory-{size}"
    )
    script = f"mount -t tmpfs -o size={size} tmpfs /dev/shm; {run} 2>&1"
    command = [*OWN_MOUNTS, "sh", "-c", script]
    done = subprocess.run(command, cwd=ROOT, timeout=200, check=False, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 1, done.stdout[-4000:]
    assert found in done.stdout
    assert "lightning/pytorch" not in done.stdout, "no traceback but of PyTorch's destructor"
