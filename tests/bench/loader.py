"""Samples per second of the training stream, relative to decoding alone and to OpenLRM's dataset class.

Each sample has 4 of 32 views at 512 px. The images are renders of demo objects; they are rendered once and stored in
bench/. All sides use the same number of processes.
"""

import itertools
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lrm_pl.data.batch import PackedBatch
from lrm_pl.data.mixture import DataSet, Mixture
from lrm_pl.data.schema import decode_image
from lrm_pl.data.stream import BatchPartition, TrainingStream
from lrm_pl.data.transforms import Augmentation, CropConfig
from tests.bench.demo_run import ROOT

OBJECTS = ("chair", "motorbike", "plant", "rock1", "sofa2", "teddyBear")
VIEWS, SIDE, BATCH, USED = 32, 512, 4, 4
FASTER_THAN_OPENLRM, SHARE_OF_DECODING = 3.0, 0.85
STEPS, WARM = 50, 10


def measure(_: Path, rounds: int) -> list[dict[str, object]]:
    """Measure the three sides alternately, with no workers and with two."""
    shards, images = prepare(ROOT / "bench" / "loader")
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], Dataset]] = {
        "ours": lambda: stream(shards),
        "decoding": lambda: Decoding(stream(shards)),
        "openlrm": lambda: Images(images),
    }
    found: list[dict[str, object]] = []
    for workers in (0, 2):
        rates: dict[str, list[float]] = {name: [] for name in makers}
        for _round in range(rounds):
            for name, make in makers.items():
                rates[name].append(rate(make(), workers))
        for other, target, words in (
            ("openlrm", FASTER_THAN_OPENLRM, "the dataset class of OpenLRM"),
            ("decoding", SHARE_OF_DECODING, "decoding only"),
        ):
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates[other], strict=True))
            found.append({
                "bench": f"loader, {USED} of {VIEWS} views at {SIDE} px, {workers} workers: speed relative to {words}",
                "value": ratio, "target": f">= {target}", "met": ratio >= target,
                "samples_per_second": {k: statistics.median(v) for k, v in rates.items()}, "rounds": rates,
            })  # fmt: skip
    return found


def prepare(folder: Path) -> tuple[Path, Path]:
    """Render the shards and unpack them to OpenLRM's layout, unless they exist."""
    assets, shards, images = folder / "assets", folder / "shards", folder / "images"
    if not (shards / "manifest.json").is_file():
        assets.mkdir(parents=True, exist_ok=True)
        for name in OBJECTS:
            shutil.copy(ROOT / "data_tools" / "demo_assets" / f"{name}.glb", assets)
        command = [
            ROOT / ".venv-render" / "bin" / "python", "-m", "data_tools", "render", "--assets", assets,
            "--out", shards, "--views", VIEWS, "--res", SIDE, "--held-out", 0,
        ]  # fmt: skip
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    if not images.is_dir():
        partial = folder / "images.partial"
        shutil.rmtree(partial, ignore_errors=True)
        reader = stream(shards).reader
        for place in (stream(shards).order.locate(g) for g in range(len(OBJECTS))):
            sample = reader.read(place, range(VIEWS))
            out = partial / sample.info.id
            (out / "rgba").mkdir(parents=True)
            (out / "pose").mkdir()
            np.save(out / "intrinsics.npy", sample.fxfycxcy[0])
            for view, encoded in enumerate(sample.views):
                Image.fromarray(decode_image(sample.info.id, encoded)).save(out / "rgba" / f"{view:03d}.png")
                np.save(out / "pose" / f"{view:03d}.npy", sample.c2w[view, :3])
        partial.rename(images)
    return shards, images


def stream(shards: Path) -> TrainingStream:
    """Return the training stream: an input view and three more per sample."""
    crop = Augmentation(CropConfig(128, 384, 128))
    mixture = Mixture([DataSet(str(shards))])
    return TrainingStream(mixture, BatchPartition(BATCH), 1, USED - 1, 0, None, crop, 0, 4, STEPS + WARM)


def rate(dataset: Dataset, workers: int) -> float:
    """Return the samples per second after a warm-up; packed batches are unpacked as for a CPU step."""
    batched = None if isinstance(dataset, IterableDataset) else BATCH
    loader = DataLoader(dataset, batch_size=batched, num_workers=workers)
    batches = (batch.to("cpu") if isinstance(batch, PackedBatch) else batch for batch in loader)
    for _ in itertools.islice(batches, WARM):
        pass
    start = time.perf_counter()
    count = sum(1 for _ in batches)
    assert count == STEPS
    return count * BATCH / (time.perf_counter() - start)


class Decoding(IterableDataset[int]):
    """Decode the encoded views of a stream from memory, and discard the result."""

    def __init__(self, source: TrainingStream) -> None:
        places = [source.order.locate(g) for g in range(BATCH * (STEPS + WARM))]
        kept: dict[tuple[int, int, int], bytes] = {}
        self.samples = []
        for place in places:
            views = source.read((place, 0))["__views__"]
            sample = source.reader.read(place, views)
            names = [(place.shard, place.index, view) for view in views]
            self.samples.append(
                [kept.setdefault(name, sample.views[view]) for name, view in zip(names, views, strict=True)]
            )

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for batch in range(first, STEPS + WARM, step):
            for views in self.samples[batch * BATCH : (batch + 1) * BATCH]:
                for encoded in views:
                    decode_image("", encoded)
            yield batch


class Images(Dataset[dict[str, torch.Tensor]]):
    """Folders of PNGs and poses, read as OpenLRM's dataset class reads them: converted to float, then resized."""

    def __init__(self, folder: Path) -> None:
        self.folders = sorted(folder.iterdir())

    def __len__(self) -> int:
        return BATCH * (STEPS + WARM)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        folder, rng = self.folders[index % len(self.folders)], np.random.default_rng(index)
        intrinsics = torch.from_numpy(np.load(folder / "intrinsics.npy"))
        poses, images, background = [], [], torch.from_numpy(rng.random(3, dtype=np.float32))
        for view in rng.choice(VIEWS, USED, replace=False):
            poses.append(torch.from_numpy(np.load(folder / "pose" / f"{view:03d}.npy")))
            with Image.open(folder / "rgba" / f"{view:03d}.png") as image:
                rgba = torch.from_numpy(np.array(image) / 255).float().permute(2, 0, 1)
            images.append(rgba[:3] * rgba[3:] + background[:, None, None] * (1 - rgba[3:]))
        stacked, side = torch.stack(images), int(rng.integers(128, 385))
        source = F.interpolate(stacked[:1], (224, 224), mode="bicubic", align_corners=True).clamp(0, 1)
        resized = F.interpolate(stacked, (side, side), mode="bilinear", align_corners=True)
        top, left = rng.integers(0, side - 128 + 1, 2)
        return {
            "source": source, "target": resized[:, :, top : top + 128, left : left + 128].contiguous(),
            "poses": torch.stack(poses), "intrinsics": intrinsics, "background": background,
        }  # fmt: skip


if __name__ == "__main__":
    for result in measure(Path(), 3):
        print(result)
