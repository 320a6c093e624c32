"""Checkpoints in object stores and shared folders, and of any number of processes."""

import json
import os
import re
import subprocess
import sys

import lightning as L
import pytest
import torch

from lrm_pl.checkpoints.index import (
    checkpoint_path,
    checkpoint_step,
    finalize_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoint,
)
from lrm_pl.checkpoints.owner import Owner, require_ownership
from lrm_pl.checkpoints.tensors import write_tensors
from lrm_pl.cli.main import main
from tests.integration.checkpoint_runs import AVERAGE, keeper, read, same

pytest_plugins = ["tests.servers.s3_store"]
# Lightning warns about few workers and short runs.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.slow
def test_checkpoints_in_an_object_store_are_written_deleted_and_resumed_from(fit, s3):
    bucket = "s3://bucket/runs/one"
    folder = fit("run", 6, keeper(folder=bucket))
    assert not (folder / "checkpoints").exists()
    assert [checkpoint_step(path) for path in list_checkpoints(bucket)] == [6, 4]
    whole = newest_checkpoint(bucket, print)
    tensors = read(whole)
    remove_checkpoint(whole.path)
    fit("run", 6, keeper(folder=bucket))
    again = newest_checkpoint(bucket, print)
    assert (again.step, again.run) == (6, whole.run)
    assert same(read(again), tensors)


class Intruder(L.Callback):
    """Callback that simulates the start of another run with the same checkpoint folder."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            Owner(self.folder, "runs/newer")


def test_a_run_stops_if_a_newer_run_writes_to_its_bucket(fit, s3):
    bucket = "s3://bucket/run"
    intruder = {"class_path": f"{__name__}.Intruder", "init_args": {"folder": bucket}}
    with pytest.raises(SystemExit, match=r"a newer run: .*runs/newer.*Use a separate folder for each run"):
        fit("run", 8, keeper(folder=bucket), intruder)
    assert [checkpoint_step(path) for path in list_checkpoints(bucket)] == [2]


def test_a_second_run_with_the_same_checkpoint_folder_is_rejected(fit, tmp_path):
    code = "import sys; from pathlib import Path; from lrm_pl.training.run_folder import RunLock; "
    code += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "shared")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SystemExit, match=r"Another run is using .*/shared"):
            fit("run", 2, keeper(folder=str(tmp_path / "shared")))
        other.stdin.close()
    fit("run", 2, keeper(folder=str(tmp_path / "shared")))


def test_a_new_run_does_not_resume_from_checkpoints_of_another_run(fit, tmp_path):
    shared = str(tmp_path / "shared")
    fit("a", 2, keeper(folder=shared))
    with pytest.raises(
        SystemExit,
        match=rf"no checkpoints of another run in .*, but found 1 checkpoint of {tmp_path}/a. Resume that run",
    ):
        fit("b", 4, keeper(folder=shared))
    assert not (tmp_path / "b" / "config.yaml").exists()
    require_ownership(shared, str(tmp_path / "a"))  # goes on


def test_a_run_continues_if_old_checkpoints_cannot_be_deleted(fit, monkeypatch, caplog):
    def refuse(*arguments, **options):
        raise OSError("busy")

    monkeypatch.setattr("lrm_pl.checkpoints.retention.remove_checkpoint", refuse)
    folder = fit("run", 6, keeper(keep=1))
    assert "could not be deleted: busy" in caplog.text
    assert len(list_checkpoints(str(folder / "checkpoints"))) == 3


def test_a_warning_is_logged_if_a_run_does_not_continue_the_average(fit, caplog):
    fit("run", 2, keeper(), AVERAGE)
    fit("run", 4, keeper())
    assert "contains a moving average, which is ignored" in caplog.text


def test_a_resumed_run_keeps_earlier_configs_and_validation_does_not_change_the_run(fit, tmp_path, shards):
    folder = fit("run", 2, keeper())

    def contents():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    config = (folder / "config.yaml").read_text()
    fit("run", 4, keeper())
    assert (folder / "earlier/until-step-00000002/config.yaml").read_text() == config
    assert (folder / "config.yaml").read_text() == config.replace("max_steps: 2", "max_steps: 4").replace(
        "val_check_interval: 2", "val_check_interval: 4"
    )
    before = contents()
    options = ["--ckpt_path", str(folder), "--data.val_objects", "null"]
    main(["validate", "-c", str(folder / "config.yaml"), *options])
    after = contents()
    assert {path: after[path] for path in before} == before
    new = {path.relative_to(folder).parts[0] for path in after if path not in before}
    assert new == {"validate"}
    assert list((folder / "validate").glob("events.*"))
    longer = ["--run.folder", str(folder), "--trainer.max_steps", "5", "--run.profile", "3"]
    main(["fit", "-c", str(folder / "config.yaml"), *longer])
    assert newest_checkpoint(str(folder / "checkpoints"), print).step == 5, (
        "also with nothing left to profile"
    )


def test_a_missing_bucket_is_an_error_before_the_first_step(fit, s3):
    with pytest.raises(SystemExit, match="bucket does not exist"):
        fit("run", 2, keeper(folder="s3://nowhere/run"))


def test_a_run_resumes_from_the_previous_checkpoint_if_the_newest_is_damaged(fit, caplog):
    folder = fit("run", 6, keeper(keep=9))
    path = f"{folder}/checkpoints/step-00000006"
    whole = read(read_checkpoint(path))
    with open(f"{path}/__0_0.distcp", "r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    fit("run", 6, keeper(keep=1))
    assert "Skipping a damaged checkpoint" in caplog.text
    assert same(read(read_checkpoint(path)), whole)
    assert list_checkpoints(f"{folder}/checkpoints") == [path]


@pytest.mark.parametrize("logger", ["false", "lightning.pytorch.loggers.CSVLogger"])
def test_a_run_is_resumed_from_its_folder_with_any_logger(fit, tmp_path, monkeypatch, logger):
    monkeypatch.chdir(tmp_path)  # a run without a logger would use the working directory
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options = [f"--trainer.logger={logger}"]
    fit("run", 2, keeper(), options=options)
    folder = fit("run", 4, keeper(), options=options)
    assert [checkpoint_step(path) for path in list_checkpoints(f"{folder}/checkpoints")] == [4, 2]
    assert not (tmp_path / "elsewhere" / "checkpoints").exists()


# --- any number of processes

WRITE_OR_READ = """
import atexit, json, os, sys, torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from lrm_pl.checkpoints.index import checkpoint_path, finalize_checkpoint, read_checkpoint
from lrm_pl.checkpoints.tensors import read_tensors, write_tensors
from lrm_pl.training.processes import wait_for_gloo_threads

def say(*words):  # one write, so that the ranks' lines do not mix
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

what, *folders = sys.argv[1:]
dist.init_process_group("gloo")
atexit.register(wait_for_gloo_threads)
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))
copies = init_device_mesh("cpu", (2, world // 2))
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))  # sizes that no number of processes divides
plain = {name: p.detach().clone() for name, p in network.named_parameters()}
fully_shard(network, mesh=mesh)
tensors = {f"network.{name}": p.detach() for name, p in network.named_parameters()}
whole = {
    "adam.rows": torch.arange(33.0).reshape(11, 3), "adam.columns": torch.arange(35).reshape(5, 7),
    "adam.copies": torch.arange(26).bfloat16().reshape(13, 2), "adam.same": torch.arange(4.0),
}
tensors["adam.rows"] = distribute_tensor(whole["adam.rows"], mesh, [Shard(0)])
tensors["adam.columns"] = distribute_tensor(whole["adam.columns"], mesh, [Shard(1)])
tensors["adam.copies"] = distribute_tensor(whole["adam.copies"], copies, [Replicate(), Shard(0)])
tensors["adam.same"] = distribute_tensor(whole["adam.same"], mesh, [Replicate()])
tensors["adam.step"] = torch.tensor(3.0)
whole |= {f"network.{name}": t for name, t in plain.items()} | {"adam.step": torch.tensor(3.0)}

def check(folder):
    for tensor in tensors.values():
        tensor.zero_()
    read_tensors(read_checkpoint(checkpoint_path(folder, 1)), tensors)
    for name, tensor in tensors.items():
        found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(found, whole[name]), (name, found)
    say("EXACT", len(tensors))

def fail(folder):
    try:
        write_tensors(checkpoint_path(folder, 1), tensors, dist.group.WORLD)
    except OSError as error:
        say("ERROR", rank, error)

if what == "write":
    path = checkpoint_path(folders[0], 1)
    files = write_tensors(path, tensors, dist.group.WORLD)
    if rank == 0:
        finalize_checkpoint(path, 1, {}, files)
        say("FILES", json.dumps(files))
    dist.barrier()
    check(folders[0])
    fail(folders[0] + "/file")  # rank 0 cannot create the folder
    if rank == 1:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    fail(folders[0] + "/full")  # rank 1 cannot write its file
else:
    for folder in folders:
        check(folder)
"""


@pytest.fixture
def processes(tmp_path, root):
    def run(count, what, *folders):
        (tmp_path / "program.py").write_text(WRITE_OR_READ)
        done = subprocess.run(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}",
                str(tmp_path / "program.py"), what, *map(str, folders),
            ],
            cwd=root, capture_output=True, text=True, timeout=150,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_sharded_checkpoints_are_read_with_any_number_of_processes_and_errors_are_raised_on_all_ranks(
    tmp_path, processes
):
    (tmp_path / "file").write_text("")
    output = processes(2, "write", tmp_path)
    assert sorted(json.loads(re.search("FILES (.*)", output)[1])) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp"
    ]  # fmt: skip
    assert output.count("EXACT 9") == 2
    assert output.count("ERROR") == 4
    assert output.count("File too large") == 2
    assert list_checkpoints(str(tmp_path / "full")) == []
    tensors = read(read_checkpoint(checkpoint_path(str(tmp_path), 1)))
    assert torch.equal(tensors["adam.rows"], torch.arange(33.0).reshape(11, 3))
    assert torch.equal(tensors["adam.columns"], torch.arange(35).reshape(5, 7))
    assert torch.equal(tensors["adam.copies"], torch.arange(26).bfloat16().reshape(13, 2))
    path = checkpoint_path(str(tmp_path / "one"), 1)
    finalize_checkpoint(path, 1, {}, write_tensors(path, tensors))
    assert processes(4, "read", tmp_path, tmp_path / "one").count("EXACT 9") == 8
