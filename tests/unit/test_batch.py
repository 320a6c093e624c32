"""Transfer of batches from worker processes through pinned memory to a device."""

import dataclasses
import shutil
import types

import psutil
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from lrm_pl.data.batch import PackedBatch, collate
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.manifest import read_manifest, write_manifest
from lrm_pl.data.mixture import DataSet, Mixture
from lrm_pl.data.stream import BatchPartition, EvaluationSet, TrainingStream
from lrm_pl.data.synthetic import synthetic_sample
from lrm_pl.data.transforms import Augmentation, CropConfig, CropStage, evaluation_item
from lrm_pl.kernels import device, views_numba


def stream(folder, steps, size=16):
    crop = Augmentation(CropConfig(size, 32, size))
    return TrainingStream(
        Mixture([DataSet(str(folder))]), BatchPartition(2), 1, 3, 2, None, crop, 0, 4, steps
    )


@pytest.fixture(params=["training", "evaluation"])
def packed(request, shards):
    """A packed batch, whose targets are crops in training and full views in evaluation."""
    if request.param == "training":
        return next(iter(stream(shards, 1)))
    return collate([evaluation_item(synthetic_sample(name, 4, 20, 0), 2, [2, 3]) for name in "ab"])


def tensors(batch):
    views = (*vars(batch.input).values(), *vars(batch.target).values())
    return [tensor for tensor in (*views, batch.weight) if tensor is not None]


def same(one, other):
    for found, expected in zip(tensors(one), tensors(other), strict=True):
        assert torch.equal(found.cpu(), expected)
        assert found.stride() == expected.stride()
    assert (one.ids, one.faults) == (other.ids, other.faults)


def test_training_batches_of_workers_equal_batches_of_this_process(shards):
    alone = list(DataLoader(stream(shards, 4), batch_size=None))
    sent = list(DataLoader(stream(shards, 4), batch_size=None, num_workers=2))
    for one, other in zip(alone, sent, strict=True):
        assert other.flat.is_shared()
        same(one.to("cpu"), other.to("cpu"))


def test_evaluation_batches_of_workers_equal_batches_of_this_process(shards):
    items = EvaluationSet(Mixture([DataSet(str(shards))]), "train", 1, slice(-2, None))
    alone, sent = (list(DataLoader(items, collate_fn=collate, num_workers=count)) for count in (0, 1))
    assert len(alone) == len(items)
    for one, other in zip(alone, sent, strict=True):
        same(one.to("cpu"), other.to("cpu"))


def test_collate_stacks_the_tensors_of_items():
    items = [evaluation_item(synthetic_sample(name, 4, 20, 0), 1, [2, 3]) for name in "ab"]
    batch = collate(items).to("cpu")
    assert batch.ids == ("a", "b")
    for index, item in enumerate(items):
        for part in ("input", "target"):
            views, expected = getattr(batch, part), getattr(item, part).over_white()
            for name in ("images", "alpha", "background", "c2w", "fxfycxcy"):
                assert torch.equal(getattr(views, name)[index], getattr(expected, name)), (part, name)


def test_the_size_of_a_packed_batch_equals_the_hand_computed_value():
    packed = collate([evaluation_item(synthetic_sample(name, 4, 20, 0), 1, [2, 3]) for name in "ab"])
    weight, pixels, pose, camera = (
        64,
        2 * 20 * 20 * 4,
        2 * 64,
        64,
    )  # of one view; 8 and 32 bytes are padded to 64
    assert packed.flat.shape == (weight + (pixels + pose + camera) + (2 * pixels + 2 * pose + 64),)


def _block(packed):
    start = packed.flat.data_ptr()
    return range(start, start + packed.flat.numel())


def test_tensors_of_a_packed_batch_are_aligned(packed):
    flat = packed.flat.data_ptr()
    inside = [x for x in tensors(packed.to("cpu")) if x.data_ptr() in _block(packed)]
    assert len(inside) >= 5
    assert {(x.data_ptr() - flat) % 64 for x in inside} == {0}


def test_batches_on_the_cpu_share_memory_with_the_packed_batch(packed):
    batch = packed.to("cpu")
    assert batch.weight.untyped_storage().data_ptr() == packed.flat.data_ptr()


def test_pytorch_operators_create_the_same_batch_as_numba(packed, monkeypatch):
    expected = packed.to("cpu")
    monkeypatch.setattr(device, "HOST_TYPES", frozenset())
    monkeypatch.delattr(views_numba, "over_white")
    same(packed.to("cpu"), expected)


class Copies(TorchDispatchMode):
    """Record the operators that copy from one device to another, and whether they block."""

    def __init__(self):
        super().__init__()
        self.blocking = []

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        if isinstance(found, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            if found.device != args[0].device:
                self.blocking.append(not kwargs.get("non_blocking", False))
        return found


def test_a_batch_is_copied_to_a_gpu_with_one_asynchronous_copy(packed):
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        batch = packed.to("cuda")
    assert copies.blocking == [False]
    assert {tensor.device.type for tensor in tensors(batch)} == {"cuda"}
    for found, expected in zip(tensors(batch), tensors(packed.to("cpu")), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (
            expected.shape,
            expected.dtype,
            expected.stride(),
        )


@pytest.fixture
def pinned(monkeypatch):
    """Replace ``Tensor.pin_memory``, which requires an accelerator, and return the pinned tensors."""
    blocks = []

    def pin(tensor):
        blocks.append(tensor.clone())
        return blocks[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return blocks


def test_pytorch_pins_a_packed_batch_with_one_call(packed, pinned):
    found = pin_memory(packed)
    assert isinstance(found, PackedBatch)
    assert found.flat is pinned[0]
    assert len(pinned) == 1
    same(found.to("cpu"), packed.to("cpu"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_pins_each_batch_once(shards, pinned, monkeypatch, workers):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    found = list(DataLoader(stream(shards, 3), batch_size=None, num_workers=workers, pin_memory=True))
    assert len(pinned) == 3
    for one, other in zip(found, stream(shards, 3), strict=True):
        same(one.to("cpu"), other.to("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_on_the_gpu_equal_batches_on_the_cpu(shards, workers):
    found = list(DataLoader(stream(shards, 3), batch_size=None, num_workers=workers, pin_memory=True))
    for one, other in zip(found, stream(shards, 3), strict=True):
        assert one.flat.is_pinned()
        same(one.to("cuda"), other.to("cpu"))


def module_on(where, shards, workers):
    data = ShardDataModule(str(shards), batch_size=2, side_views=1, unseen_views=2, workers=workers)
    data.setup("fit")
    strategy = types.SimpleNamespace(root_device=torch.device(where))
    data.trainer = types.SimpleNamespace(
        strategy=strategy, global_rank=0, world_size=1, max_steps=3, accumulate_grad_batches=1
    )
    return data


@pytest.mark.parametrize(("where", "pins"), [("cpu", False), ("cuda:1", True)])
def test_loaders_pin_memory_only_for_cuda_devices(shards, where, pins):
    data = module_on(where, shards, workers=0)
    loaders = [data.train_dataloader(), *data.val_dataloader(), data.training_views_loader()]
    assert [loader.pin_memory for loader in loaders] == [pins] * 4


def test_views_smaller_than_the_crops_are_reported_once(shards, tmp_path, caplog):
    shutil.copytree(shards, tmp_path, dirs_exist_ok=True)
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path, dataclasses.replace(manifest, render=manifest.render | {"resolution": 32}))
    data = module_on("cpu", tmp_path, 0)
    data.augmentation = Augmentation(CropConfig(16, 32, 16))
    data.train_dataloader()
    assert not caplog.records
    data = module_on("cpu", tmp_path, 0)
    data.augmentation = Augmentation(CropConfig(16, 32, 16), (CropStage(5, CropConfig(16, 64, 16)),))
    data.train_dataloader()
    data.train_dataloader()
    assert [
        "views of 32 pixels are enlarged to up to 64 pixels" in one.message for one in caplog.records
    ] == [True]


def test_validation_workers_are_reused(shards):
    alone, loader = (module_on("cpu", shards, workers).evaluation_loader("unseen") for workers in (0, 2))
    seen = []
    for _ in range(2):
        batches = list(loader)
        seen.append([worker.pid for worker in loader._iterator._workers])
        for found, expected in zip(batches, alone, strict=True):
            same(found.to("cpu"), expected.to("cpu"))
    next(iter(loader))  # a validation that is limited to one batch
    assert len(list(loader)) == len(alone)
    seen.append([worker.pid for worker in loader._iterator._workers])
    assert seen[0] == seen[1] == seen[2]
    workers = loader._iterator._workers
    loader._iterator._shutdown_workers()
    assert not any(worker.is_alive() for worker in workers)


def test_the_memory_of_a_worker_does_not_grow_over_80_epochs(shards):
    steps = 160  # of two objects; the split has four
    # Spawned: a fork's memory also grows by the pages that it shared with these tests.
    loader = DataLoader(
        stream(shards, steps), batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    batches, held = iter(loader), []
    worker = psutil.Process(batches._workers[0].pid)
    for number in range(steps):
        next(batches)
        if number % 15 == 0:
            held.append(worker.memory_full_info().uss)
    assert len(held) == 11
    assert max(held[3:]) - held[3] < 2e6, held
