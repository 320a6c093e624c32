"""The Slurm job of ``lrm launch``: its command and its script."""

import re
import time

import pytest

from lrm_pl.cluster.launch import main
from lrm_pl.errors import InputError
from tests.builders import SCRIPT, a_launch, command_of, run_job


def test_the_sbatch_command_of_a_gpu_job(checkout):
    assert command_of(a_launch()) == [
        *(
            "sbatch",
            "--parsable",
            "--job-name=mine-1",
            "--nodes=2",
            "--ntasks-per-node=8",
            "--cpus-per-task=6",
        ),
        *("--gres=gpu:8", "--partition=gpu", "--account=lab", "--time=1-00:00:00"),
        *("--output=runs/mine-1/slurm-%j.log", SCRIPT, "runs/mine-1", "/cache"),
        *("python", "-m", "lrm_pl", "fit", "-c", "configs/trainer/ddp.yaml", "-c", "mine.yaml"),
        *("--trainer.num_nodes", "2", "--trainer.devices", "8", "--trainer.accelerator", "gpu"),
        *("--data.folder", "data/mine", "--run.folder", "runs/mine-1"),
    ]


@pytest.mark.parametrize(
    ("note", "status", "requeued"),
    [
        (True, 75, True),
        (True, 143, True),
        (True, 0, False),
        (True, 1, False),
        (False, 75, False),
        (False, 137, False),
    ],
)
def test_a_job_is_requeued_only_after_its_time_limit(checkout, note, status, requeued):
    """The run is replaced by a function that may write the note, and returns a status."""
    (checkout / "runs" / "mine-1").mkdir(parents=True)
    stand_ins = f"""
        srun() {{ {'touch "$LRM_REQUEUE_NOTE"' if note else ":"}; return {status}; }}
        exec() {{ echo "$@"; exit; }}
    """
    with run_job(checkout, stand_ins, a_launch()) as job:
        output = job.stdout.read()
    assert ("scontrol requeue 17" in output) == requeued, output
    assert job.returncode == (0 if requeued else status)
    assert (checkout / "runs/mine-1/.requeue").exists() == (note and not requeued), (
        "a remaining note would requeue the job twice"
    )


@pytest.mark.parametrize(("note", "found"), [(True, "scontrol requeue 17"), (False, "the run ended")])
def test_at_the_time_limit_a_job_is_requeued_at_once_and_a_cancelled_job_waits_for_its_run(
    checkout, note, found
):
    (checkout / "runs" / "mine-1").mkdir(parents=True)
    stand_ins = f"""
        srun() {{
            {'touch "$LRM_REQUEUE_NOTE"' if note else ":"}
            touch begun; sleep 2; echo the run ended; return 75
        }}
        exec() {{ echo "$@"; exit; }}
    """
    with run_job(checkout, stand_ins, a_launch()) as job:
        until = time.monotonic() + 30
        while not (checkout / "begun").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        job.terminate()
        output = job.stdout.read().splitlines()
    assert found in output
    assert ("scontrol requeue 17" in output) == note
    assert job.returncode == (0 if note else 75)


def test_a_cpu_job_requests_no_gpu(checkout):
    command = command_of(a_launch(gpus=0, processes=3), partition="", account="")
    assert not [word for word in command if re.match("--(gres|partition|account)", word)]
    assert "--ntasks-per-node=3" in command
    assert "--trainer.devices 3 --trainer.accelerator cpu" in " ".join(command)


def test_a_container_mounts_the_working_folder_and_the_data(checkout, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere")
    command = command_of(a_launch(), container="lab/image:1", cache=checkout / "cache", mounts=[str(outside)])
    mounts = f"--container-mounts={checkout}:{checkout},{outside}:{outside}"
    step = ["--container-image=lab/image:1", mounts, f"--container-workdir={checkout}", "python"]
    assert command[command.index(SCRIPT) + 3 :][: len(step)] == step


def test_a_mounted_path_with_a_comma_is_rejected(checkout):
    with pytest.raises(InputError, match="without commas or colons"):
        command_of(a_launch(), container="image", mounts=["/data/a,b"])


def test_an_argument_with_a_line_break_is_rejected(no_slurm):
    with pytest.raises(SystemExit, match="printable"):
        main(["--nodes=2", "--gpus=8", "-c", "mine.yaml", "--dry-run", "--partition=gpu\n#SBATCH --uid=0"])
