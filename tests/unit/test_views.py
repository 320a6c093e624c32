"""Views from bytes to floats: the kernels against their plain twins; a batch that a worker sends."""

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from lrm_pl.data.batch import collate
from lrm_pl.data.dataset import EvaluationSet, Share, TrainingStream
from lrm_pl.data.mixture import DataSet, Mixture
from lrm_pl.data.transforms import Augmentation, CropConfig
from lrm_pl.kernels.views import over_white, over_white_plain, resized_window, resized_window_plain


def bytes_of(height, width, seed=0):
    rgba = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    rgba[: height // 3] = 0  # empty, as most of a render is
    return rgba


def test_over_white_by_hand():
    rgba = torch.tensor([[[255, 0, 51, 255], [255, 0, 51, 0], [255, 0, 51, 51]]], dtype=torch.uint8)
    images, alpha = over_white(rgba)
    assert torch.allclose(images[:, 0, 0], torch.tensor([1, 0, 0.2]))
    assert torch.equal(images[:, 0, 1], torch.ones(3))
    assert torch.allclose(images[:, 0, 2], torch.tensor([1, 0.8, 0.2 * 0.2 + 0.8]))
    assert torch.allclose(alpha, torch.tensor([[1, 0, 0.2]]))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7, 4), (1, 64, 64, 4), (33, 20, 4)])
def test_over_white_is_its_twin_to_the_bit(shape):
    rgba = torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))
    for found, expected in zip(over_white(rgba), over_white_plain(rgba), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("height", "width", "side", "size"),
    [(512, 512, 384, 128), (512, 512, 128, 128), (512, 512, 129, 100), (64, 64, 64, 20), (64, 64, 63, 63),
     (48, 64, 37, 16), (40, 40, 100, 64), (7, 9, 1, 1)],
)  # fmt: skip
def test_a_resized_window_is_cut_out_of_what_its_twin_resizes(height, width, side, size):
    rgba, spare = bytes_of(height, width), side - size
    for top, left in {(0, 0), (spare, spare), (0, spare), (spare // 2, spare // 3)}:
        found = resized_window(rgba, side, top, left, size)
        expected = resized_window_plain(rgba, side, top, left, size)
        assert found.shape == (4, size, size)
        assert (found - expected).abs().max() <= 3e-7


def stream(folder, steps, size=16):
    crop = Augmentation(CropConfig(size, 32, size))
    return TrainingStream(Mixture([DataSet(str(folder))]), Share(2), 1, 3, 2, None, crop, 0, 4, steps)


def same(one, other):
    for part in ("input", "target"):
        for name, tensor in vars(getattr(one, part)).items():
            found = getattr(getattr(other, part), name)
            assert found is tensor is None or torch.equal(found, tensor), (part, name)
    assert torch.equal(one.weight, other.weight)
    assert (one.ids, one.faults) == (other.ids, other.faults)


def test_a_batch_arrives_from_a_worker_as_it_is_made_here(shards):
    alone = list(DataLoader(stream(shards, 4), batch_size=None))
    sent = list(DataLoader(stream(shards, 4), batch_size=None, num_workers=2))
    for one, other in zip(alone, sent, strict=True):
        same(one, other)
        storages = {tensor.untyped_storage().data_ptr() for tensor in vars(other.target).values()}
        assert len(storages) == 1, "one piece of memory"


def test_an_evaluation_set_arrives_from_a_worker_as_it_is_made_here(shards):
    items = EvaluationSet(Mixture([DataSet(str(shards))]), "train", 1, slice(-2, None))
    alone, sent = (list(DataLoader(items, collate_fn=collate, num_workers=count)) for count in (0, 1))
    assert len(alone) == len(items)
    for one, other in zip(alone, sent, strict=True):
        same(one, other)


def test_the_memory_of_a_worker_stays_flat_over_eighty_epochs(shards):
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
