"""Training runs in processes of their own (gloo), with a time limit and a log; their checkpoints and scalars."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lrm_pl.checkpoints.index import newest_checkpoint, read_checkpoint
from lrm_pl.checkpoints.tensors import read_tensors, tensor_names
from lrm_pl.cli.main import main
from tests import ROOT

RUN_CONFIG = {
    "seed_everything": 0,
    "model": {
        "lrm": {
            "encoder": {"name": "test_vit", "image_size": 32, "frozen": False},
            "decoder": {"channels": 4, "width": 8, "layers": 3},
            "dim": 16,
            "depth": 2,
            "heads": 2,
            "camera_dim": 8,
            "plane_tokens": 4,
        },
        "renderer": {"samples_per_ray": 8},
        "objective": {"lpips": 0.0},
        "optimizer": {"lr": 1e-3},  # large, so that a difference would grow
    },
    "data": {
        "batch_size": 4,
        "side_views": 1,
        "unseen_views": 2,
        "val_objects": 4,
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
    """Runs in subfolders of one folder, on one set of shards."""

    def __init__(self, folder, shards):
        self.folder, self.shards = folder, shards
        (folder / "tiny.yaml").write_text(yaml.safe_dump(RUN_CONFIG))

    def start(
        self, name, processes, *options, layers=(), threads=1, command="fit", module="lrm_pl", **environment
    ):
        """Start a run in its own process group. Its output is appended to NAME.log.

        Args:
            name: Name of its folder and its log.
            processes: Number of processes.
            options: Options of the command line.
            layers: Configs of configs/trainer.
            threads: Threads per process.
            command: Subcommand of ``lrm``.
            module: Module to run: ``lrm_pl``, or ``tests.accelerator.run`` for the code paths of accelerators.
            environment: Environment variables.
        """
        arguments = self._arguments(command, name, processes, options, layers)
        launcher = (
            [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        )
        launcher += [] if processes == 1 else [str(processes)]
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, *launcher, "-m", module, *arguments],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
            )  # fmt: skip

    def _arguments(self, command, name, processes, options, layers):
        configs = [self.folder / "tiny.yaml", *(ROOT / f"configs/trainer/{layer}.yaml" for layer in layers)]
        return [
            command, *(part for config in configs for part in ("-c", str(config))),
            "--data.folder", str(self.shards), "--trainer.devices", str(processes),
            "--run.folder", str(self.folder / name), *map(str, options),
        ]  # fmt: skip

    def fit_here(self, name, *options, layers=("cpu",)):
        """Train in this process, which avoids the start of a process."""
        main(self._arguments("fit", name, 1, options, layers))

    def run(self, name, processes, *options, limit_s=150, status=0, **how):
        """Run to the end and return the log."""
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
        """Return all scalars of TensorBoard but timings: tag -> [(step, value)]."""
        events = EventAccumulator(str(self.folder / name), size_guidance={"scalars": 0})
        events.Reload()
        timed = ("speed/", "memory/", "time/")
        tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith(timed) and tag != "epoch"]
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}

    def losses(self, name):
        return dict(self.scalars(name)["loss/total"])

    def final(self, name):
        """Return the newest checkpoint and all its tensors, unsharded."""
        return self._read(newest_checkpoint(str(self.folder / name / "checkpoints"), print))

    def at(self, name, step):
        """Return the checkpoint of a step and its tensors, as ``final`` does."""
        return self._read(read_checkpoint(str(self.folder / name / "checkpoints" / f"step-{step:08d}")))

    def _read(self, checkpoint):
        tensors = {key: torch.empty(shape) for key, shape in tensor_names(checkpoint).items()}
        read_tensors(checkpoint, tensors)
        return checkpoint, tensors


def descendants(pid):
    """Return the process IDs of all descendants; those of a launcher run in sessions of their own."""
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    own = [int(line) for line in done.stdout.split()]
    return own + [grandchild for child in own for grandchild in descendants(child)]


def kill(process):
    """Kill all processes of a run at once, as a power failure would."""
    everyone = [process.pid, *descendants(process.pid)]
    for pid in everyone:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(
        Path(f"/proc/{pid}/cmdline").is_file() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in everyone
    ):
        assert time.monotonic() < deadline, f"{everyone} do not die"
        time.sleep(0.05)


def keep_every(steps, keep=10):
    """Return the option that saves a checkpoint every ``steps`` steps."""
    callbacks = [
        {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"},
        {"class_path": "lrm_pl.training.image_metrics.ImageMetricsLogger"},
        {"class_path": "lrm_pl.callbacks.view_logger.ViewLogger"},
        {
            "class_path": "lrm_pl.training.checkpointing.CheckpointAndResume",
            "init_args": {"every": steps, "keep": keep, "monitor": None},
        },
    ]
    return f"--trainer.callbacks={json.dumps(callbacks)}"


def largest_difference(ours, theirs):
    """Return the largest relative difference of two loss curves with equal steps."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)
