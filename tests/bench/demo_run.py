"""Training runs of the demo's size on analytic shards, shared by the benchmarks. They need no download."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from lrm_pl.cli.lightning_cli import LRMCLI
from lrm_pl.data.batch import Batch
from lrm_pl.data.synthetic import write_synthetic_shards
from tests import ROOT


def write_shards(folder: Path) -> Path:
    """Write analytic shards with as many objects, views and pixels as the demo."""
    write_synthetic_shards(folder, train=40, val=8, views=16, resolution=128, shard_size=8)
    return folder


def build(shards: Path, folder: Path, *options: str) -> LRMCLI:
    """Build the run of `make train` with all its callbacks, random weights and no LPIPS."""
    arguments = [
        "-c", str(ROOT / "configs/experiment/demo.yaml"), "--data.folder", str(shards),
        "--model.objective.lpips", "0", "--trainer.limit_val_batches", "0",
        "--trainer.logger.init_args.save_dir", str(folder), *options,
    ]  # fmt: skip
    return LRMCLI("fit", arguments, records=False)


class RepeatedBatches(Dataset[Batch]):
    """Dataset that repeats decoded batches."""

    def __init__(self, batches: list[Batch], length: int) -> None:
        self.batches, self.length = batches, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.batches[index % len(self.batches)]


def fit_on_cached_batches(cli: LRMCLI, callback: L.Callback) -> None:
    """Train on a few batches held in memory, with one more callback at the end of the list."""
    data, steps = cli.datamodule, cli.trainer.max_steps
    data.setup("fit")
    data.trainer = cli.trainer
    batches = [batch.to("cpu") for batch, _ in zip(data.train_dataloader(), range(8), strict=False)]
    data.train_dataloader = lambda: DataLoader(RepeatedBatches(batches, steps), batch_size=None)
    cli.trainer.callbacks.append(callback)
    cli.trainer.fit(cli.model, data)


def launch_processes(processes: int, threads: int, module: str, *arguments: str) -> str:
    """Run a module of this package under torchrun and return its standard output."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    with tempfile.TemporaryFile("w+") as log:
        done = subprocess.run(
            [*command, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)}, timeout=900, check=False,
        )  # fmt: skip
        if done.returncode:
            log.seek(0)
            raise RuntimeError(
                f"{' '.join(command)} {module} ended with {done.returncode}:\n{log.read()[-4000:]}"
            )
    return done.stdout


def machine() -> dict[str, object]:
    """Return the processor, the version of torch and the load of this machine."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),
    }
