"""Habits of users of Lightning: its settings, its loggers, Ctrl-C, a saved config. All work, or are refused at once."""

import contextlib
import csv
import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
import time
import warnings

import lightning as L
import pytest
import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from lrm_pl.__main__ import main as lrm
from lrm_pl.apps.evaluate import main as evaluate
from lrm_pl.checkpoints import list_checkpoints
from lrm_pl.cli.fit_config import build_meta_model, parse_fit
from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.cli.main import command_line, main
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.manifest import Manifest, write_manifest
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.errors import InputError
from lrm_pl.evaluation.protocols import PROTOCOLS
from lrm_pl.inference.export import export
from lrm_pl.inference.pipeline import LRMPipeline
from lrm_pl.losses.objective import Objective
from lrm_pl.training.ema import validates_with_average
from lrm_pl.training.module import LRMModule
from lrm_pl.training.optim import OptimizerConfig
from lrm_pl.training.signals import REQUEUE_NOTE, StopSignals
from lrm_pl.version import git_commit
from tests.builders import TINY

# Lightning warns of small things (few workers, short runs) that are so by design here.
pytestmark = pytest.mark.filterwarnings("default")


class OtherLogger(Logger):
    """A logger that takes no folder."""

    name, version = "other", 0

    def __init__(self, color: str = "red") -> None:
        super().__init__()
        self.color, self.steps = color, []

    def log_metrics(self, metrics, step=None):
        self.steps.append(step)

    def log_hyperparams(self, params, *args, **kwargs):
        self.params = params


class Told(L.Callback):
    """Tells this process that its time is up when training is done, before the report."""

    def on_fit_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGUSR1)


class Mistaken(L.Callback):
    """Raises in the middle of training."""

    def on_train_batch_end(self, *arguments):
        raise ArithmeticError("a mistake in a callback")


class FullDisk(L.Callback):
    """Writes to a disk without room, as a logger or an image might."""

    def on_train_batch_end(self, *arguments):
        with open("/dev/full", "w") as file:
            file.write("anything")


@pytest.fixture
def here(tmp_path, shards, monkeypatch):
    """An empty working folder; returns the arguments of a tiny run with the loggers and callbacks of every run."""
    monkeypatch.chdir(tmp_path)
    trainer = {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1, "precision": "32-true"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "trainer": trainer}))
    return ["-c", "tiny.yaml", "--data.folder", str(shards)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.accelerator=gpu"], "No supported gpu backend found"),
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--trainer.strategy=nosuch"], "invalid strategy name"),
        (["--trainer.strategy=FSDP2Strategy"], "-c configs/trainer/fsdp2.yaml"),
        (["--trainer.strategy=ddp_spawn"], "processes that run the whole command, but found start_method spawn"),
        (["--trainer.strategy=ddp_notebook"], "found start_method notebook"),
        (
            ["--trainer.strategy=DDPStrategy", "--trainer.strategy.start_method=fork"],
            "found start_method fork",
        ),
        (["--trainer.val_check_interval=0.5"], "trainer.val_check_interval as a number of steps, but found 0.5"),
        (["--trainer.val_check_interval=00:00:00:05"], "as a number of steps, but found 00:00:00:05"),
        (["--ckpt_path=runs/lrm/version_0"], "to start a new run from a checkpoint"),
        (["--trainer.devices=0"], "not a valid input"),
        (["--trainer.accelerator=cpu", "--trainer.devices=-1"], "should be an int > 0"),
        (
            ["--trainer.callbacks+=lrm_pl.training.checkpointing.CheckpointAndResume", "--trainer.callbacks.every=0"],
            "expected every, keep and keep_every of at least 1, but found 0",
        ),
        (["--trainer.max_steps=${nosuch.key}"], "in the config: Interpolation key 'nosuch.key'"),
        (["--trainer.max_steps=${oc.env:LRM_NOT_SET}"], "Environment variable 'LRM_NOT_SET' not found"),
        (["--model.class_path=my.Module"], "to name a class of your own, but found --model.class_path"),
        (
            ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.num_nodes=2"],
            "expected 2 nodes started together, but found this node alone",
        ),
        (["--trainer.profiler=nosuch"], "profiler"),
        (["--trainer.strategy=null"], "invalid strategy name"),
        (["--seed_everything=-3"], "expected a seed from 0 to 4294967295, but found -3"),
        (["--data.batch_size=-2"], "expected a data.batch_size of at least 1, but found -2"),
        (["--trainer.callbacks+=ModelCheckpoint"], "`ModelCheckpoint` in callbacks list"),
        (
            ["--trainer.callbacks+=lrm_pl.training.ema.WeightAverage"] * 2,
            "expected one WeightAverage among trainer.callbacks, because checkpoints store one average, but found 2",
        ),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"],
            "Early stopping conditioned on metric `val_loss` which is not available",
        ),
        (["--trainer.logger=MLFlowLogger"], "cannot create lightning.pytorch.loggers.MLFlowLogger: "),
        (["--trainer.logger=CometLogger", "--run.folder=run"], "loggers.CometLogger: Requirement"),
    ],
)  # fmt: skip
def test_what_lightning_refuses_is_one_message(here, options, message):
    with pytest.raises(SystemExit) as refused:
        main(["fit", *here, *options])
    said = str(refused.value.code)
    assert said.startswith("lrm: ")
    assert message in said
    assert "\n" not in said


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
def test_a_process_in_a_slurm_allocation_is_a_task_of_srun_only_where_srun_started_it(
    here, monkeypatch, more, options, environment
):
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # the trainer sets it, for all that follows
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "1")  # it is set for Lightning, and taken back here
    for name, value in ({"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "notebook"} | more).items():
        monkeypatch.setenv(name, value)
    line = LRMCLI("fit", [*here, "--trainer.accelerator=cpu", *options], records=False)
    assert type(line.trainer.strategy.cluster_environment).__name__ == environment if options else True
    wanted = {"TorchElasticEnvironment": (2, 1), "SLURMEnvironment": (2, 1)}.get(environment)
    if wanted is not None:
        assert (line.trainer.world_size, line.trainer.global_rank) == wanted


def test_nodes_with_different_numbers_of_tasks_are_refused(here, monkeypatch):
    tasks = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    for name, value in tasks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        SystemExit, match="expected the same number of srun tasks on each node, but found 2,1"
    ):
        main(["fit", *here, "--trainer.accelerator=cpu"])


@pytest.mark.parametrize(("terminal", "tasks"), [(True, 1), (False, 4)])
def test_a_shell_that_srun_gives_a_terminal_is_one_process_and_what_it_starts_by_srun_are_several(
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
def test_processes_that_would_each_be_a_run_of_its_own_are_refused(
    here, tmp_path, monkeypatch, launcher, variables
):
    for name, value in ({"SLURM_NTASKS_PER_NODE": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"found 2 that {launcher} started: .*--trainer.devices 2"):
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
def test_a_place_among_processes_that_no_launcher_gave_is_refused(here, tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = " ".join(f"{name}={value}" for name, value in variables.items() if not name.startswith("MASTER"))
    with pytest.raises(SystemExit, match=f"expected process 0 of 1, but found {found} in the environment"):
        main(["fit", *here, "--trainer.accelerator=cpu"])
    assert not (tmp_path / "runs").exists()
    if "RANK" in variables:
        with pytest.raises(
            SystemExit, match=f"expected process 0 of 1, but found {found} in the environment"
        ):
            evaluate(["--ckpt=none", "--data=none"])


@pytest.mark.parametrize("where", [[], ["--run.folder=run"]])
def test_any_logger_works_and_each_run_has_a_folder_of_its_own(here, tmp_path, where):
    for logger in (f"{__name__}.OtherLogger", "false"):
        command_line(["fit", *here, f"--trainer.logger={logger}", *where, "--trainer.max_steps=2"])
        if where:
            break
    folders = [tmp_path / "run"] if where else [tmp_path / "runs/lrm" / f"version_{n}" for n in (0, 1)]
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert names >= {"config.yaml", "commit.txt", "input.yaml", "checkpoints", "views", "report.json"}, (
            folder
        )
    assert {path.name for path in tmp_path.iterdir()} == {
        "tiny.yaml",
        folders[0].relative_to(tmp_path).parts[0],
    }


def test_runs_are_below_lightnings_default_root_dir_unless_a_logger_says_otherwise(here, tmp_path):
    root = ["--trainer.default_root_dir=elsewhere", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    for options, folder in (([], "elsewhere/lrm"), (["--trainer.logger.save_dir=mine"], "mine/lrm")):
        line = LRMCLI("fit", [*here, *root, *options], records=False)
        assert line.trainer.log_dir == f"{folder}/version_0"


def test_a_fast_dev_run_leaves_no_files(here, tmp_path, capsys):
    command_line(["fit", *here, "--trainer.fast_dev_run=true"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    assert "no files were kept" in capsys.readouterr().out


def test_a_runs_own_config_begins_another_run(here, tmp_path):
    command_line(["fit", *here, "--run.folder=old"])
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
    command_line(["fit", "-c", "old/config.yaml", "--model.optimizer.lr=1e-3"])
    assert {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()} == before
    new = tmp_path / "runs/lrm/version_0"
    assert len(list_checkpoints(str(new / "checkpoints"))) == 1
    told = yaml.safe_load((new / "config.yaml").read_text())
    assert (told["run"]["folder"], told["model"]["optimizer"]["lr"]) == (None, 1e-3)
    assert next((tmp_path / "runs").rglob("events.out*")).parent == new


def test_the_record_is_of_the_newest_start_and_what_it_was_is_kept(here, tmp_path):
    folder = tmp_path / "run"

    def start(*options):
        command_line(["fit", *here, "--run.folder=run", *options])
        return yaml.safe_load((folder / "config.yaml").read_text())

    first = start()
    assert start("--trainer.max_steps=4") != first
    assert start("--trainer.max_steps=4")["trainer"]["max_steps"] == 4
    kept = folder / "earlier/until-step-00000002"
    assert [path.name for path in folder.glob("earlier/*")] == [kept.name], "only where something has changed"
    assert yaml.safe_load((kept / "config.yaml").read_text()) == first
    assert not (kept / "commit.txt").exists()


def test_a_finished_run_that_is_measured_on_other_data_was_not_trained_on_them(here, tmp_path, shards):
    command_line(["fit", *here, "--run.folder=run"])
    record = {name: (tmp_path / "run" / name).read_bytes() for name in ("config.yaml", "input.yaml")}
    (tmp_path / "others").symlink_to(shards)
    command_line(["fit", *here, "--run.folder=run", "--data.folder=others", "--model.optimizer.lr=1"])
    assert record == {name: (tmp_path / "run" / name).read_bytes() for name in record}
    export("run", tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    assert f"| trained on | {shards.name}: " in card
    assert " views | PSNR " not in card, "the report is of other data"


def test_a_finished_run_says_so_and_one_that_went_further_is_not_cut(here, tmp_path, capsys):
    command_line(["fit", *here, "--run.folder=run"])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        command_line(["fit", *here, "--run.folder=run"])
    assert "is complete (2 steps). Raise --trainer.max_steps to continue it" in capsys.readouterr().out
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("report/heldout/psnr")] == [2], "logged once"
    assert not [one for one in warned if "CombinedLoader" in str(one.message)]
    with pytest.raises(
        InputError, match=r"at least the 2 steps that the run in .* has, but found 1. Raise it"
    ):
        command_line(
            ["fit", *here, "--run.folder=run", "--trainer.max_steps=1", "--trainer.val_check_interval=1"]
        )


def test_the_commit_is_that_of_this_code_and_not_of_a_project_around_it(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "theirs"]
    subprocess.run(["git", "-C", str(tmp_path), *own], check=True)
    installed = tmp_path / "venv" / "commit.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr("lrm_pl.version.__file__", str(installed))
    assert git_commit() == "unknown"
    subprocess.run(["git", "-C", str(tmp_path), "add", "venv"], check=True)
    assert git_commit() != "unknown", "the code is in that project"


def test_ctrl_c_keeps_the_step_and_the_run_goes_on_there(here, tmp_path):
    """Sent to the whole group, workers among them, as a terminal does."""
    command = [sys.executable, "-m", "lrm_pl", "fit", *here, "--run.folder=run", "--data.workers=2"]
    process = subprocess.Popen(
        [*command, "--trainer.max_steps=5000", "--trainer.log_every_n_steps=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    said = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: said.extend(process.stdout))
    reader.start()
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/views/*step000002.png")) and process.poll() is None:
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 75, "".join(said)
    reader.join()
    text = "".join(said)
    assert "Stopping after this step with a checkpoint. Press Ctrl-C again" in text
    assert "stopped by a signal after step" in text
    assert "Traceback" not in text
    assert "--run.folder" in text
    (kept,) = list_checkpoints(str(tmp_path / "run/checkpoints"))[:1]
    step = int(kept.rpartition("-")[2])
    line = command_line(["fit", *here, "--run.folder=run", f"--trainer.max_steps={step + 2}"])
    assert line.trainer.callback_metrics["val/heldout/psnr_pooled"] > 0


def test_a_terminal_that_is_closed_ends_a_run_with_its_newest_step_kept(here, tmp_path):
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "lrm_pl", "fit", *here, "--run.folder=run", "--data.workers=1"]

    def take_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    process = subprocess.Popen(
        [*command, "--trainer.max_steps=5000"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/views/*step000002.png")) and process.poll() is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 10_000)
        time.sleep(0.05)
    os.close(ours)
    assert process.wait(60) == 75
    assert list_checkpoints(str(tmp_path / "run/checkpoints"))


def test_a_run_under_nohup_does_not_hear_of_its_terminals_end(monkeypatch):
    signals, trainer = StopSignals(), L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals.listen(trainer)
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
        signals.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak)])
def test_a_second_ctrl_c_stops_at_once_whatever_came_before(first):
    before = signal.getsignal(signal.SIGINT)
    signals = StopSignals()
    signals.listen(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
    try:
        os.kill(os.getpid(), first)
        if first != signal.SIGINT:
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.timeout(60)
def test_an_error_ends_a_run_that_has_data_workers(here):
    with pytest.raises(ArithmeticError, match="a mistake in a callback"):
        main(
            [
                "fit",
                *here,
                "--run.folder=run",
                "--data.workers=2",
                f"--trainer.callbacks+={__name__}.Mistaken",
            ]
        )


def test_a_disk_that_is_full_of_anything_ends_the_run_with_one_message(here):
    with pytest.raises(
        SystemExit, match=r"^lrm: no space left .*No space left on device.*again with --run.folder"
    ):
        main(["fit", *here, "--run.folder=run", f"--trainer.callbacks+={__name__}.FullDisk"])


def test_the_exit_status_of_a_run_stays_where_nobody_reads_what_it_says(root):
    code = "import sys; from lrm_pl.apps.broken_pipes import ignore_broken_pipes; ignore_broken_pipes(); "
    code += "print('begun', flush=True); sys.stdin.read(1); print('more'); sys.stderr.write('stopped'); sys.exit(75)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    for unbuffered in ("", "1"):
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        with subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment, **pipes) as process:
            assert process.stdout.readline() == b"begun\n"
            process.stdout.close()
            process.stdin.close()
            assert process.wait(60) == 75


def test_a_command_whose_stdout_is_closed_ends_well_and_what_it_prints_is_in_no_file(root, tmp_path):
    code = "import os, sys; from lrm_pl.apps.broken_pipes import ignore_broken_pipes; ignore_broken_pipes(); "
    code += "file = open(sys.argv[1], 'wb'); print('said', flush=True); os.system('echo said')"
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code, str(tmp_path / "file")]
    subprocess.run(closed, cwd=root, check=True, timeout=60)
    assert (tmp_path / "file").read_bytes() == b""


def test_views_that_are_too_small_to_be_measured_are_refused_before_a_run(here, tmp_path):
    manifest = write_synthetic_shards(tmp_path / "small", views=4, resolution=24)
    write_manifest(
        tmp_path / "small", dataclasses.replace(manifest, render=manifest.render | {"resolution": 24})
    )
    with pytest.raises(
        SystemExit, match=r"expected views of 31 pixels or more, as LPIPS needs .*, but found 24"
    ):
        main(["fit", *here, f"--data.folder={tmp_path / 'small'}"])
    with pytest.raises(InputError, match="found 24"):
        PROTOCOLS["lrm"].check_manifest(Manifest((), 15, 0, {"resolution": 24}), "data")


def test_a_folder_that_cannot_be_written_ends_the_run_with_one_message(here, monkeypatch):
    def read_only(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    with pytest.raises(SystemExit, match=r"^lrm: no access to .*Read-only file system: 'runs.*--run"):
        main(["fit", *here])


def test_the_report_is_of_the_average_where_validations_are(here, tmp_path, capsys):
    average = {
        "class_path": "lrm_pl.training.ema.WeightAverage",
        "init_args": {"decay": 0.9, "validate": True},
    }
    line = command_line(
        [
            "fit",
            *here,
            "--run.folder=run",
            "--model.optimizer.lr=1e-2",
            f"--trainer.callbacks+={json.dumps(average)}",
        ]
    )
    measured = line.trainer.callback_metrics["val/heldout/psnr_pooled"]
    assert line.reports["heldout"].rows["model"].psnr_pooled == pytest.approx(float(measured), abs=1e-4)
    assert "model (average)" in capsys.readouterr().out


@pytest.mark.parametrize("section", ["trainer", "data", "run", "weights", "weights.encoder", "data.crop"])
def test_a_section_whose_lines_are_all_commented_out_is_refused_and_drops_nothing(here, tmp_path, section):
    outer, _, inner = section.partition(".")
    (tmp_path / "empty.yaml").write_text(f"{outer}:\n  {inner}{':' if inner else '# all'}\n")
    with pytest.raises(
        InputError, match=rf"expected settings in the section {section}, but found an empty section"
    ):
        LRMCLI("fit", [*here, "-c", "empty.yaml"], records=False)


def test_one_callback_needs_no_list(here):
    line = LRMCLI("fit", [*here, "--trainer.callbacks=LearningRateMonitor"], records=False)
    names = [type(callback).__name__ for callback in line.trainer.callbacks]
    assert {"CheckpointAndResume", "LearningRateMonitor"} <= set(names)
    assert len(line.portable_config.trainer.callbacks) == 1, "the record has a list too"


@pytest.mark.parametrize(
    ("name", "averages"), [("lrm_pl.training.ema.WeightAverage", True), ("mine.Checks", False)]
)
def test_validations_are_of_the_average_by_the_class_of_the_callback(tmp_path, name, averages):
    callback = {"class_path": name, "init_args": {"validate": True}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    assert validates_with_average(tmp_path / "config.yaml") is averages


def test_what_lightnings_callbacks_say_of_learning_rates_and_steps_is_so(here, tmp_path, monkeypatch):
    monkeypatch.setattr("lrm_pl.cli.lightning_cli.print_report", lambda *_: {})
    options = [
        "--run.folder=run",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=.",
        "--trainer.enable_checkpointing=true",
        "--trainer.callbacks+=LearningRateMonitor",
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=1",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.val_check_interval=100",
        "--model.optimizer.warmup=0.5",
    ]
    main(["fit", *here, *options, "--trainer.max_steps=3", "--trainer.log_every_n_steps=2"])
    main(["fit", *here, *options, "--trainer.max_steps=5", "--trainer.log_every_n_steps=1"])
    files = {file.name for file in tmp_path.glob("run/checkpoints/*.ckpt")}
    assert files >= {f"epoch=0-step={step}.ckpt" for step in range(1, 6)}
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    rates = {
        int(row["step"]): float(row[name])
        for row in rows
        for name in row
        if name.startswith("lr-") and row[name]
    }
    schedule = OptimizerConfig(warmup=0.5)
    assert rates[1] == pytest.approx(schedule.learning_rate(0, 3))
    assert rates[3] == pytest.approx(schedule.learning_rate(3, 5)), (
        "of the step that a resumed run begins with"
    )
    assert rates[4] == pytest.approx(schedule.learning_rate(3, 5))


def test_a_note_that_cannot_be_written_does_not_end_the_run(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv(REQUEUE_NOTE, str(tmp_path / "gone" / "note"))
    signals = StopSignals()
    signals.listen(L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
    os.kill(os.getpid(), signal.SIGUSR1)
    signals.restore()
    assert signals.received is signal.SIGUSR1
    assert "will not ask for another start" in caplog.text


def test_a_signal_during_the_report_ends_it_and_the_run_can_be_measured_later(here, capsys):
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *here, "--run.folder=run", f"--trainer.callbacks+={__name__}.Told"])
    assert stopped.value.code == 75
    said = capsys.readouterr().err
    assert "a signal stopped the report after the last step; the run is in" in said
    assert "start the same command with --run.folder" in said
    assert signal.getsignal(signal.SIGUSR1) is before


def test_validate_reads_the_runs_config_where_none_is_given(here, tmp_path, monkeypatch):
    command_line(["fit", *here, "--run.folder=run"])
    monkeypatch.setattr(sys, "argv", ["lrm", "validate", "--ckpt_path", "run"])
    lrm()
    events = EventAccumulator(str(tmp_path / "run/validate")).Reload()
    assert [event.step for event in events.Scalars("val/heldout/psnr_pooled")] == [2], "the checkpoint's"
    assert [event.step for event in events.Images("views/heldout")] == [2]
    assert (tmp_path / "run/validate/views/heldout-step000002.png").is_file()


def test_a_mistyped_checkpoint_is_said_before_data_that_the_default_config_lacks():
    with pytest.raises(SystemExit, match="expected a checkpoint or a run at runs/nosuch, but found nothing"):
        main(["validate", "--ckpt_path", "runs/nosuch"])


def test_the_seed_of_the_command_line_is_that_of_the_order_of_samples(here):
    def positions(*options):
        data = LRMCLI("fit", [*here, "--trainer.callbacks=[]", *options], records=False).datamodule
        return data.seed

    assert positions("--seed_everything=5") == 5
    assert positions("--seed_everything=5", "--data.seed=3") == 3


def test_hsdp_makes_a_copy_a_node(here, root):
    hsdp = ["-c", str(root / "configs/trainer/hsdp.yaml"), "--trainer.num_nodes=4"]
    assert parse_fit([*here, *hsdp])["trainer"]["strategy"]["init_args"]["replicas"] == 4


def test_hyperparameters_and_the_reports_metrics_reach_tensorboard(here, tmp_path):
    line = command_line(["fit", *here, "--run.folder=run", "--model.optimizer.lr=3e-4"])
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    told = {}
    for name, content in events.PluginTagToContent("hparams").items():
        told[name.rpartition("/")[2]] = HParamsPluginData.FromString(content)
    values = told["session_start_info"].session_start_info.hparams
    assert values["model.optimizer.lr"].number_value == 3e-4
    assert values["trainer.callbacks.CheckpointAndResume.every"].number_value == 500
    assert values["model.objective.lpips_start_step"].number_value == 0
    assert values["commit"].string_value == git_commit()
    metrics = {info.name.tag for info in told["experiment"].experiment.metric_infos}
    assert {"val/heldout/psnr_pooled", "report/heldout/psnr_pooled", "report/unseen/lpips"} <= metrics
    (point,) = events.Scalars("report/heldout/psnr_pooled")
    assert point.step == 2
    assert point.value == pytest.approx(line.reports["heldout"].rows["model"].psnr_pooled)
    assert "hp_metric" not in events.Tags()["scalars"]
    assert yaml.safe_load((tmp_path / "run/hparams.yaml").read_text())["model.optimizer.lr"] == 3e-4


def test_hyperparameters_and_the_reports_metrics_reach_csv_and_any_logger(here, root, tmp_path):
    loggers = ["-c", str(root / "configs/logger/csv.yaml"), f"--trainer.logger+={__name__}.OtherLogger"]
    line = command_line(["fit", *here, *loggers, "--run.folder=run", "--data.batch_size=1"])
    told = yaml.safe_load((tmp_path / "run/hparams.yaml").read_text())
    assert (told["data.batch_size"], told["commit"]) == (1, git_commit())
    assert told["trainer.logger"] == "CSVLogger, OtherLogger"
    assert line.trainer.loggers[1].params == told
    rows = list(csv.reader((tmp_path / "run/metrics.csv").read_text().splitlines()))
    last = dict(zip(rows[0], rows[-1], strict=True))
    assert last["step"] == "2"
    found = line.reports["heldout"].rows["model"].psnr_pooled
    assert float(last["report/heldout/psnr_pooled"]) == pytest.approx(found)


class OwnObjective(Objective):
    """One term more.

    Args:
        weight: Of the planes' mean square.
        options: Of ``Objective``.
    """

    def __init__(self, weight: float = 0.1, **options) -> None:
        super().__init__(**options)
        self.weight = weight

    def forward(self, evidence, step):
        return super().forward(evidence, step) | {"planes": self.weight * evidence.planes.square().mean()}


class OwnModule(LRMModule):
    """Counts its steps.

    Args:
        extra: A field of its own.
        options: Of ``LRMModule``.
    """

    def __init__(self, extra: int = 1, **options) -> None:
        super().__init__(**options)
        self.extra, self.steps = extra, 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


class OwnData(ShardDataModule):
    """Takes a field more.

    Args:
        note: Of no effect.
        options: Of ``ShardDataModule``.
    """

    def __init__(self, note: str = "", **options) -> None:
        super().__init__(**options)
        self.note = note


def test_own_objective_module_and_data_are_trained_resumed_measured_estimated_and_exported(
    here, tmp_path, capsys
):
    own = {
        "model_class": f"{__name__}.OwnModule",
        "data_class": f"{__name__}.OwnData",
        "model": {"extra": 3, "objective": {"class_path": f"{__name__}.OwnObjective", "init_args": {"weight": 2.0}}},
        "data": {"note": "mine"},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    here = [*here, "-c", "own.yaml", "--run.folder=run", "--model.objective.mse=0.5"]
    line = command_line(["fit", *here])
    assert type(line.model) is OwnModule
    assert (line.model.extra, line.model.steps, line.datamodule.note) == (3, 2, "mine")
    assert (line.model.objective.weight, line.model.objective.mse, line.model.objective.lpips) == (2, 0.5, 0)
    assert line.trainer.callback_metrics["loss/planes"] > 0
    again = command_line(["fit", *here, "--trainer.max_steps=4"])
    assert (again.model.steps, again.trainer.global_step) == (2, 4)
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (record["model_class"], record["model"]["extra"]) == (own["model_class"], 3)
    assert type(command_line(["validate", "--ckpt_path=run"]).model) is OwnModule
    assert type(build_meta_model(here)[1].objective) is OwnObjective
    export("run", tmp_path / "model")
    assert LRMPipeline.from_pretrained(str(tmp_path / "model")).step == 4


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model_class=nowhere.Module", r"name an importable class, but found nowhere.Module \(No module"),
        ("--data_class=lightning.LightningDataModule", "to name a subclass of ShardDataModule, but found lightning."),
        ("-c=class.yaml", "model_class: my.MyModule, and move its init_args directly into"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_be_trained_is_refused_with_what_to_write(here, tmp_path, option, message):
    (tmp_path / "class.yaml").write_text("model: {class_path: my.MyModule, init_args: {extra: 3}}\n")
    with pytest.raises(SystemExit, match=message):
        main(["fit", *here, option])
