"""Tests of the run folder: lock, checkpoint selection and folders of loggers."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lrm_pl.checkpoints.index import CheckpointError, checkpoint_path, finalize_checkpoint, remove_checkpoint
from lrm_pl.checkpoints.selection import choose_checkpoint, find_checkpoint, read_newest
from lrm_pl.checkpoints.tensors import write_tensors
from lrm_pl.data.source import ShardSource
from lrm_pl.errors import InputError
from lrm_pl.training.checkpointing import CheckpointAndResume
from lrm_pl.training.run_folder import (
    RunLock,
    create_run_folder,
    find_run_folder,
    run_path,
    set_logger_folders,
    trainer_folder,
)


def write(folder, step):
    path = checkpoint_path(str(folder), step)
    files = write_tensors(path, {"a": torch.tensor(step)})
    return finalize_checkpoint(path, step, {}, files).path


# --- one run at a time

HOLDER = """
import os, sys, time
from pathlib import Path
from lrm_pl.training.run_folder import RunLock
lock = RunLock(Path(sys.argv[1]))
child = os.fork() if sys.argv[2] == "fork" else 1
if child == 0:  # as a data worker
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(root, tmp_path):
    """Start a process that holds the lock of a folder."""
    started = []

    def start(folder, how="alone"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), how],
            cwd=root,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout.readline().strip()
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        process.stdout.close()


def test_a_second_run_in_the_same_folder_is_rejected(tmp_path, holder):
    holder(tmp_path / "run")
    with pytest.raises(InputError, match=r"Another run is using .*run\. .*--run\.folder"):
        RunLock(tmp_path / "run")
    RunLock(tmp_path / "other")


def test_the_lock_of_a_killed_run_is_released_while_its_workers_run(tmp_path, holder):
    process = holder(tmp_path / "run", "fork")
    process.kill()
    process.wait(10)
    RunLock(tmp_path / "run")


# --- what to go on from


def test_resume_auto_starts_a_new_run_or_resumes(tmp_path):
    assert choose_checkpoint("auto", None) is None
    assert choose_checkpoint("auto", str(tmp_path / "none")) is None
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert choose_checkpoint("auto", str(tmp_path)).step == 2


def test_resume_never_rejects_a_folder_with_checkpoints(tmp_path):
    assert choose_checkpoint("never", None) is None
    assert choose_checkpoint("never", str(tmp_path)) is None
    path = write(tmp_path, 1)
    (Path(path) / "index.json").unlink()
    with pytest.raises(InputError, match=r"expected no checkpoints in .*, but found 1. .*--run\.resume auto"):
        choose_checkpoint("never", str(tmp_path))


def test_resume_accepts_the_path_of_a_checkpoint_or_a_run(tmp_path):
    first = tmp_path / "first" / "checkpoints"
    path = write(first, 10)
    write(first, 20)
    new = str(tmp_path / "second" / "checkpoints")
    assert choose_checkpoint(path, new).step == 10
    assert choose_checkpoint(path + "/", None).step == 10
    assert choose_checkpoint(str(tmp_path / "first"), new).step == 20
    assert find_checkpoint(str(first)).step == 20


def test_a_newer_checkpoint_is_read_if_the_run_deletes_a_checkpoint(tmp_path, caplog):
    place = tmp_path / "run" / "checkpoints"
    write(place, 10)
    tried = []

    def read(found):
        tried.append(found.step)
        if found.step == 10:  # meanwhile the run has gone on
            write(place, 20)
            remove_checkpoint(found.path)
        return (Path(found.path) / ".metadata").read_bytes()

    assert read_newest(str(tmp_path / "run"), read)
    assert tried == [10, 20]
    assert "was deleted while it was read; reading a newer checkpoint" in caplog.text
    with pytest.raises(FileNotFoundError):
        read_newest(str(tmp_path / "run"), lambda found: (Path(found.path) / "none").read_bytes())


def test_a_restarted_run_resumes_from_its_own_checkpoints(tmp_path, caplog):
    path = write(tmp_path / "first" / "checkpoints", 10)
    own = tmp_path / "second" / "checkpoints"
    write(own, 15)
    assert choose_checkpoint(path, str(own)).step == 15
    assert "Resuming from the checkpoints of this run" in caplog.text


def test_resume_rejects_an_earlier_checkpoint_of_the_same_run(tmp_path):
    path = write(tmp_path / "checkpoints", 10)
    write(tmp_path / "checkpoints", 20)
    with pytest.raises(
        InputError, match=r"in the folder of this run, whose newest checkpoint is .*step-00000020"
    ):
        choose_checkpoint(path, str(tmp_path / "checkpoints"))


def test_the_name_of_a_run_may_contain_step(tmp_path):
    write(tmp_path / "two-step-lr" / "checkpoints", 3)
    assert find_checkpoint(str(tmp_path / "two-step-lr")).step == 3


def test_a_missing_checkpoint_is_an_error(tmp_path):
    for path, found in ((tmp_path / "nowhere", "nothing"), (tmp_path, r"no index\.json")):
        with pytest.raises(CheckpointError, match=rf"found {found}.*RUN/checkpoints/step-"):
            find_checkpoint(str(path))


# --- loggers


def logger_config(kind, **arguments):
    return {"class_path": f"lightning.pytorch.loggers.{kind}", "init_args": arguments}


def test_tensorboard_and_csv_write_to_the_run_folder(tmp_path):
    from lightning.pytorch import loggers

    configs = [logger_config("TensorBoardLogger", save_dir="runs", name="lrm"), logger_config("CSVLogger")]
    set_logger_folders(configs, str(tmp_path / "run"))
    for config in configs:
        made = getattr(loggers, config["class_path"].rsplit(".", 1)[1])(**config["init_args"])
        assert Path(made.log_dir) == tmp_path / "run"


def test_folders_of_wandb_and_single_loggers_are_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": None}
    set_logger_folders(one, "runs/mine")  # relative: made absolute, so that a later chdir changes nothing
    assert one["init_args"] == {"save_dir": str(tmp_path / "runs"), "name": "", "version": "mine"}
    set_logger_folders(False, "runs/mine")
    set_logger_folders([], "runs/mine")
    wandb = logger_config("WandbLogger", project="x")
    set_logger_folders([wandb], "runs/mine")
    assert wandb["init_args"] == {"project": "x", "save_dir": str(tmp_path / "runs" / "mine"), "name": "mine"}


def test_runs_that_start_at_the_same_time_create_different_folders(tmp_path):
    def begin():
        logger = TensorBoardLogger(str(tmp_path), "lrm")
        return L.Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False, max_steps=1)

    trainers = [begin() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(create_run_folder, trainers))
    assert sorted(folder.name for folder in folders) == [f"version_{number}" for number in range(8)]
    assert [trainer_folder(trainer) for trainer in trainers] == folders


def test_find_run_folder_accepts_checkpoints_and_runs(tmp_path):
    (tmp_path / "run/checkpoints/step-00000001").mkdir(parents=True)
    (tmp_path / "run/config.yaml").touch()
    for path in ("run", "run/checkpoints", "run/checkpoints/step-00000001"):
        assert find_run_folder(str(tmp_path / path)) == tmp_path / "run"
    assert find_run_folder(str(tmp_path)) is None


def test_the_home_folder_is_expanded_in_data_and_checkpoint_folders(monkeypatch, tmp_path, shards):
    monkeypatch.setenv("HOME", str(shards.parent))
    assert ShardSource(f"~/{shards.name}").location == str(shards)
    assert ShardSource(f"~/{shards.name}").manifest().views == 8
    assert CheckpointAndResume(folder="~/checkpoints").folder == f"{shards.parent}/checkpoints"


@pytest.mark.parametrize("choice", [True, None])
def test_loggers_without_a_folder_are_rejected(choice, tmp_path):
    with pytest.raises(InputError, match=r"expected a logger or false for trainer\.logger"):
        set_logger_folders(choice, str(tmp_path))


def test_run_path_expands_the_home_folder_and_rejects_urls(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_path("~/run") == tmp_path / "run"
    with pytest.raises(InputError, match=r"--run\.folder: expected a path"):
        run_path("")
    with pytest.raises(
        InputError, match=r"--run\.folder: expected a path .* s3://b/run.*CheckpointAndResume"
    ):
        run_path("s3://b/run")


def test_only_supported_arguments_of_a_logger_are_set(tmp_path):
    class Bare:
        """Takes no folder."""

    class Named:
        def __init__(self, name: str = "", save_dir: str = "") -> None:
            """Take both."""

    for kind, wanted in ((Bare, {}), (Named, {"save_dir": str(tmp_path / "run"), "name": "run"})):
        globals()[kind.__name__] = kind
        config = {"class_path": f"{__name__}:{kind.__name__}", "init_args": {}}
        set_logger_folders(config, str(tmp_path / "run"))
        assert config["init_args"] == wanted
