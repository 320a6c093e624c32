"""The job script and the doctor on a real Slurm with two nodes."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrm_pl.cluster import slurm
from lrm_pl.cluster.launch import Launch, sbatch_command
from lrm_pl.paths import cache_folder
from tests.builders import TINY
from tests.servers.slurm import idle_nodes

pytestmark = pytest.mark.slow

PROGRAM = """
import os, signal, time
rank = os.environ["SLURM_PROCID"]
signal.signal(signal.SIGUSR1, lambda *_: print("rank", rank, "got USR1"))
print("rank", rank, "of", os.environ["SLURM_NTASKS"], "on", os.environ["SLURMD_NODENAME"])
while not os.path.exists("stop"):
    time.sleep(0.1)
raise SystemExit(3 if rank == "1" else time.sleep(300))
"""


@pytest.fixture
def here(tmp_path, root, monkeypatch):
    """A working folder with the job scripts, if two nodes are idle."""
    if len(idle := idle_nodes()) < 2:
        pytest.skip(f"needs a Slurm with two idle nodes, but found {idle}")
    shutil.copytree(root / "configs" / "cluster", tmp_path / "configs" / "cluster")
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    return tmp_path


def wait_for(log, pattern, count, seconds=60):
    """Wait until a log has ``count`` matches of a pattern, and return its text."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        text = log.read_text(errors="replace") if log.is_file() else ""  # while it is written
        if len(re.findall(pattern, text, re.MULTILINE)) >= count:
            return text
        time.sleep(0.2)
    pytest.fail(f"expected {count} x {pattern!r} within {seconds} s, but found:\n{text}")


def test_a_job_receives_its_signal_is_requeued_and_ends_when_a_rank_fails(here):
    launch = Launch(2, 1, 0, (), "data", Path("runs/try"), ())
    launch.run.mkdir(parents=True)
    program = [sys.executable, "program.py"]
    job = slurm.submit(sbatch_command(launch, program, cpus=1, cache=here / "cache", time="5"))
    log = launch.run / f"slurm-{job}.log"
    try:
        wait_for(log, r"^rank \d of 2", 2)
        subprocess.run(["scancel", "--signal=USR1", job], check=True)  # as --signal=USR1@120 does, in time
        wait_for(log, r"^rank \d got USR1", 2)
        subprocess.run(["scontrol", "requeue", job], check=True)
        wait_for(log, "DUE TO JOB REQUEUE", 1)
        # Slurm delays a requeued job for two minutes because nodes reject the credential of a job for up to a
        # second after it has ended.
        time.sleep(3)
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
        text = wait_for(log, r"^rank \d of 2", 4)
        assert re.search(rf"job {job}, start 1, on .*job {job}, start 2, on ", text, re.DOTALL), text
        places = set(re.findall(r"^rank (\d) of 2 on (\S+)$", text, re.MULTILINE))
        assert len(places) == len({node for _, node in places}) == 2, "each rank runs on a different node"
        (here / "stop").touch()  # rank 1 fails, rank 0 would sleep on
        wait_for(log, r"srun: error: .* task 1: Exited with exit code 3", 1)
        for _ in range(100):
            if not subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip():
                break
            time.sleep(0.2)
        else:
            pytest.fail(f"expected the job to end with its rank, but found it running:\n{log.read_text()}")
    finally:
        subprocess.run(["scancel", job], check=False, capture_output=True)


def test_a_run_that_reaches_its_time_limit_is_saved_requeued_and_resumed(here, root, shards):
    shutil.copytree(root / "configs" / "trainer", here / "configs" / "trainer")
    trainer = {"max_steps": 60, "limit_val_batches": 0, "log_every_n_steps": 1, "precision": "32-true"}
    config = {**TINY, "trainer": {**trainer, "val_check_interval": 60}}
    (here / "tiny.yaml").write_text(yaml.safe_dump(config | {"data": TINY["data"] | {"workers": 1}}))
    launch = Launch(2, 1, 0, ("configs/trainer/ddp.yaml", "tiny.yaml"), str(shards), Path("runs/real"), ())
    launch.run.mkdir(parents=True)
    program = [sys.executable, *launch.fit_command()]
    job = slurm.submit(sbatch_command(launch, program, cpus=1, cache=cache_folder(), time="5"))
    log = launch.run / f"slurm-{job}.log"
    try:
        wait_for(log, "loss=", 1)
        subprocess.run(["scancel", "--signal=USR1", job], check=True)  # as --signal=USR1@120 does, in time
        text = wait_for(log, "which resumes from its last checkpoint", 1)
        stopped = int(re.search(r"stopped by a signal after step (\d+). The state was saved in", text)[1])
        assert 0 < stopped < 60
        time.sleep(3)  # see above
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
        text = wait_for(log, r"max_steps=60", 1)
        assert f"Resuming after step {stopped} from" in text
        for _ in range(300):
            state = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True).stdout.strip()
            if not state:
                break
            time.sleep(0.2)
        assert (launch.run / "report.json").is_file(), log.read_text()[-4000:]
        assert not (launch.run / ".requeue").exists()
        events = EventAccumulator(str(launch.run), size_guidance={"scalars": 0}).Reload()
        assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 61))
    finally:
        subprocess.run(["scancel", job], check=False, capture_output=True)


def test_doctor_checks_both_nodes_and_prints_one_table(here, root, shards):
    command = [sys.executable, "-m", "lrm_pl", "doctor", "--nodes=2", "--gpus=0", f"--data.folder={shards}"]
    given = ["--data.batch_size=3", "--data.side_views=1", "--data.unseen_views=2", "--data.workers=0"]
    given += ["--weights.pretrained=false", "--weights.source=pypi", "--model.objective.lpips=0"]
    given += ["--weights.lpips_alex.path=none.pth"]
    done = subprocess.run(
        command + given,
        env=os.environ | {"LRM_CACHE": str(here / "cache")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0, "a batch of 3 is not divisible by 2 processes"
    found = [line.split("│")[2].strip() for line in done.stdout.splitlines() if line.startswith("│")]
    output = " ".join(found)  # cells are folded
    assert done.stdout.count("rendezvous") == 1, done.stdout + done.stderr
    assert f"{here}/runs: shared by all nodes" in output
    assert "use 2 or 4 objects per optimizer step" in done.stdout
    assert "expected a file at none.pth, but found none" in output
    assert not list(here.rglob(".doctor-*")), "the tokens are removed"
