"""Runs that srun, torchrun and other launchers start: which processes belong together."""

import os
import subprocess
import sys

import pytest
from lightning.pytorch.utilities import rank_zero_only

from lrm_pl.apps.evaluate import main as evaluate
from lrm_pl.cli.fit_config import parse_fit
from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.cli.main import main

# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize(
    ("more", "options", "environment"),
    [
        ({"SLURM_JOB_NAME": "ondemand", "SLURM_NTASKS": "4"}, [], "LightningEnvironment"),
        ({"SLURM_NTASKS": "1"}, ["--trainer.strategy=ddp", "--trainer.devices=2"], "LightningEnvironment"),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, [], "LightningEnvironment"),
        (
            {
                "SLURM_NTASKS": "1", "TORCHELASTIC_RUN_ID": "1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
                "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
            },
            ["--trainer.strategy=ddp", "--trainer.devices=2"],
            "TorchElasticEnvironment",
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
             "SLURM_NODEID": "1", "SLURM_NODELIST": "n[0-1]", "SLURM_NNODES": "2",
             "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            ["--trainer.strategy=ddp", "--trainer.num_nodes=2"],
            "SLURMEnvironment",
        ),
        (  # srun -n 2 from a shell that salloc started for 4 tasks a node
            {"SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1",
             "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "n0", "SLURM_NNODES": "1",
             "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_PTY_PORT": "1"},
            ["--trainer.strategy=ddp", "--trainer.devices=2"],
            "SLURMEnvironment",
        ),
    ],
)  # fmt: skip
def test_the_cluster_environment_is_slurm_only_for_processes_that_srun_started(
    here, monkeypatch, more, options, environment
):
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # the trainer sets it
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")  # restored after the test
    for name, value in ({"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "notebook"} | more).items():
        monkeypatch.setenv(name, value)
    line = LRMCLI("fit", [*here, "--trainer.accelerator=cpu", *options], records=False)
    assert type(line.trainer.strategy.cluster_environment).__name__ == environment if options else True
    wanted = {"TorchElasticEnvironment": (2, 1), "SLURMEnvironment": (2, 1)}.get(environment)
    if wanted is not None:
        assert (line.trainer.world_size, line.trainer.global_rank) == wanted


def test_nodes_with_different_numbers_of_tasks_are_rejected(here, monkeypatch):
    tasks = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    for name, value in tasks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        SystemExit, match="expected the same number of srun tasks on each node, but found 2,1"
    ):
        main(["fit", *here, "--trainer.accelerator=cpu"])


@pytest.mark.parametrize(("terminal", "tasks"), [(True, 1), (False, 4)])
def test_a_shell_with_a_terminal_is_one_process_and_nested_srun_tasks_are_several(
    root, tmp_path, terminal, tasks
):
    line = [
        sys.executable,
        "-c",
        "from lrm_pl.training.processes import num_srun_tasks; print(num_srun_tasks())",
    ]
    command = [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])", *line] if terminal else line
    variables = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PTY_PORT": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, env=os.environ | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
        start_new_session=True, timeout=60,
    )  # fmt: skip
    assert int(done.stdout) == tasks


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}),
        ("srun", {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "a", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
                  "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "2"}),
    ],
)  # fmt: skip
def test_a_wrong_number_of_started_processes_is_rejected(here, tmp_path, monkeypatch, launcher, variables):
    for name, value in ({"SLURM_NTASKS_PER_NODE": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        SystemExit, match=f"found 2 processes, which {launcher} started. .*--trainer.devices 2"
    ):
        main(["fit", *here, "--trainer.accelerator=cpu"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"LOCAL_RANK": "1"},
        {"NODE_RANK": "1"},
    ],
)
def test_rank_variables_without_a_launcher_are_rejected(here, tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = " ".join(f"{name}={value}" for name, value in variables.items() if not name.startswith("MASTER"))
    with pytest.raises(SystemExit, match=f"Expected process 0 of 1, but found {found} in the environment"):
        main(["fit", *here, "--trainer.accelerator=cpu"])
    assert not (tmp_path / "runs").exists()
    if "RANK" in variables:
        with pytest.raises(
            SystemExit, match=f"Expected process 0 of 1, but found {found} in the environment"
        ):
            evaluate(["--ckpt=none", "--data=none"])


def test_hsdp_creates_one_replica_per_node(here, root):
    hsdp = ["-c", str(root / "configs/trainer/hsdp.yaml"), "--trainer.num_nodes=4"]
    assert parse_fit([*here, *hsdp])["trainer"]["strategy"]["init_args"]["replicas"] == 4
