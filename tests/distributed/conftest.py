"""Real runs on several processes of this machine (gloo), each with a time limit and a log; what they left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.io.checkpoints import newest_checkpoint, read_tensors, tensor_names

ROOT = Path(__file__).resolve().parents[2]

TINY = {
    "seed_everything": 0,
    "model": {
        "lrm": {
            "encoder": {"name": "vit_small_patch14_dinov2", "image_size": 28, "frozen": False},
            "decoder": {"channels": 4, "width": 8, "layers": 3},
            "dim": 16,
            "depth": 2,
            "heads": 2,
            "camera_dim": 8,
            "plane_tokens": 4,
        },
        "renderer": {"samples_per_ray": 8},
        "objective": {"lpips": 0.0},
        "optimizer": {"lr": 3e-3},  # large, so that a difference would grow
    },
    "data": {
        "batch_size": 4,
        "side_views": 1,
        "unseen_views": 2,
        "workers": 0,
        "streams": 2,
        "crop": {"low": 16, "high": 32, "size": 16},
    },
    "weights": {"pretrained": False, "source": "pypi"},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 20,
        "val_check_interval": 10,
        "log_every_n_steps": 1,
        "precision": "32-true",
    },
}


class Runs:
    """Starts runs below one folder on one set of shards."""

    def __init__(self, folder, shards):
        self.folder, self.shards = folder, shards
        (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))

    def start(self, name, processes, *options, layers=(), threads=1, command="fit", **environment):
        """Start a run in a process group of its own; its output goes to NAME.log, appended."""
        arguments = [command, "-c", str(self.folder / "tiny.yaml")]
        arguments += [
            part for layer in layers for part in ("-c", str(ROOT / "configs" / "trainer" / f"{layer}.yaml"))
        ]
        arguments += ["--data.folder", str(self.shards), "--trainer.devices", str(processes)]
        arguments += ["--run.folder", str(self.folder / name), *map(str, options)]
        launcher = (
            [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        )
        launcher += [] if processes == 1 else [str(processes)]
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, *launcher, "-m", "lrm_pl", *arguments],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
            )  # fmt: skip

    def run(self, name, processes, *options, limit_s=150, status=0, **how):
        """Run to the end; returns the log."""
        process = self.start(name, processes, *options, **how)
        try:
            found = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            kill(process)
            raise AssertionError(f"{name} took longer than {limit_s} s:\n{self.log(name)[-4000:]}") from None
        assert found == status, f"{name} ended with {found}:\n{self.log(name)[-4000:]}"
        return self.log(name)

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def scalars(self, name):
        """Read every point of TensorBoard: tag -> [(step, value)], time left out."""
        events = EventAccumulator(str(self.folder / name), size_guidance={"scalars": 0})
        events.Reload()
        timed = ("speed/", "memory/", "time/")
        tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(timed) and tag != "epoch"]
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}

    def losses(self, name):
        return dict(self.scalars(name)["loss/total"])

    def final(self, name):
        """Read the newest checkpoint: its run state and all its tensors, whole."""
        checkpoint = newest_checkpoint(str(self.folder / name / "checkpoints"), print)
        tensors = {key: torch.empty(shape) for key, shape in tensor_names(checkpoint).items()}
        read_tensors(checkpoint, tensors)
        return checkpoint, tensors


def kill(process):
    """End a run as a power cut would: every process of it at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2)  # children of a killed launcher are reaped by init


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    shards = folder / "shards"
    write_synthetic_shards(shards, train=12, val=3, views=8, resolution=32, shard_size=2)
    return Runs(folder, shards)


def largest_difference(ours, theirs):
    """The largest relative difference of two loss curves of equal steps."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)
