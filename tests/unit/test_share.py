"""Division of the global order among processes, accumulated batches and workers."""

import itertools

import pytest
from torch.utils.data import DataLoader

from lrm_pl.data.mixture import DataSet, Mixture
from lrm_pl.data.order import SampleOrder
from lrm_pl.data.stream import BatchPartition, EvaluationSet, TrainingStream
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.data.transforms import Augmentation, CropConfig
from lrm_pl.errors import InputError
from tests.builders import spoil_first_poses

WORLDS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 3), (12, 1), (3, 4)]


def positions(world, accumulate, steps, batch_size=12, start=0):
    """Positions that each optimizer step reads, over all ranks and accumulated batches."""
    shares = [BatchPartition(batch_size, rank, world, accumulate) for rank in range(world)]
    return [
        sorted(
            g
            for share in shares
            for batch in range(step * accumulate, (step + 1) * accumulate)
            for g in share.positions(start, batch)
        )
        for step in range(steps)
    ]


@pytest.mark.parametrize(("world", "accumulate"), WORLDS)
def test_positions_of_a_step_do_not_depend_on_world_size_and_accumulation(world, accumulate):
    expected = [list(range(5 + 12 * step, 5 + 12 * (step + 1))) for step in range(7)]
    assert positions(world, accumulate, steps=7, start=5) == expected


def test_positions_equal_hand_computed_values():
    # 8 objects per step, 2 processes, 2 accumulated batches: each part of 4 positions alternates between processes.
    assert [list(BatchPartition(8, 0, 2, 2).positions(0, batch)) for batch in range(3)] == [
        [0, 2],
        [4, 6],
        [8, 10],
    ]
    assert [list(BatchPartition(8, 1, 2, 2).positions(0, batch)) for batch in range(3)] == [
        [1, 3],
        [5, 7],
        [9, 11],
    ]
    assert BatchPartition(8, 1, 2, 2).local_batch_size == 2


def test_an_indivisible_batch_size_raises_an_error_with_the_nearest_valid_sizes():
    with pytest.raises(
        InputError, match=r"divisible by 8 processes times 2 accumulated .*, but found 24\. Use 16 or 32"
    ):
        BatchPartition(24, 0, 8, 2)
    with pytest.raises(InputError, match="Use 8 objects"):
        BatchPartition(3, 0, 8, 1)
    with pytest.raises(InputError, match="found 0"):
        BatchPartition(0)
    with pytest.raises(InputError, match="accumulate_grad_batches of at least 1, but found 0"):
        BatchPartition(8, accumulate=0)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Twelve objects in shards of 5, 5 and 2."""
    folder = tmp_path_factory.mktemp("odd")
    write_synthetic_shards(folder, train=12, val=5, views=3, resolution=8, shard_size=5)
    return folder


def mixture(folder):
    return Mixture([DataSet(str(folder))])


def stream(folder, share, steps, position=0):
    crop = CropConfig(8, 8, 8)
    return TrainingStream(
        mixture(folder),
        share,
        1,
        1,
        1,
        None,
        Augmentation(crop),
        0,
        4,
        steps,
        0,
        position,
    )


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 1), (4, 3)])
def test_each_epoch_contains_every_sample_once_for_any_number_of_ranks_and_workers(
    odd, monkeypatch, world, workers
):
    ids = []
    for rank, worker in itertools.product(range(world), range(max(1, workers))):
        info = type("Info", (), {"id": worker, "num_workers": workers}) if workers else None
        monkeypatch.setattr("lrm_pl.data.stream.get_worker_info", lambda info=info: info)
        # 3 epochs of 12 objects, 4 a step; with 4 ranks x 3 workers there are more workers than shards
        ids += [key for batch in stream(odd, BatchPartition(4, rank, world), steps=9) for key in batch.ids]
    assert len(ids) == 36
    assert all(ids.count(key) == 3 for key in set(ids))
    assert len(set(ids)) == 12


def test_batches_follow_the_global_order_for_any_number_of_ranks(odd):
    order = SampleOrder((5, 5, 2), seed=0, streams=4)
    keys = stream(odd, BatchPartition(4), 1).reader
    expected = [keys.keys(p.shard)[p.index] for p in map(order.locate, range(24))]
    whole = [key for batch in stream(odd, BatchPartition(4), steps=6) for key in batch.ids]
    assert whole == expected
    dealt = [batch.ids for rank in range(2) for batch in stream(odd, BatchPartition(4, rank, 2), steps=6)]
    assert sorted(key for ids in dealt for key in ids) == sorted(expected)
    assert [
        key for batch in stream(odd, BatchPartition(6), steps=2, position=8) for key in batch.ids
    ] == expected[8:20]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_evaluation_contains_every_sample_once_and_the_same_number_of_items_per_rank(odd, world):
    ranks = [
        list(EvaluationSet(mixture(odd), "val", 1, slice(2, 3), None, rank, world)) for rank in range(world)
    ]
    assert {len(items) for items in ranks} == {-(-5 // world)}
    real = [item.ids[0] for items in ranks for item in items if item.weight]
    assert sorted(real) == [f"val-ellipsoid-{i:03d}" for i in range(5)]


def test_the_replacement_of_bad_samples_is_read_once(tmp_path):
    write_synthetic_shards(tmp_path, train=1, val=4, views=3, resolution=8, shard_size=1)
    for number in range(3):
        spoil_first_poses(tmp_path / f"val-{number:06d}.tar")
    items = EvaluationSet(mixture(tmp_path), "val", 1, slice(2, 3))
    read, read_as = [], items.reader.read_as
    items.reader.read_as = lambda location, *args: read.append(location.shard) or read_as(location, *args)
    assert [float(item.weight) for item in items] == [0, 0, 0, 1]
    assert read == [0, *range(4), 1, 2, 3]


def test_a_bad_sample_becomes_an_item_of_weight_0(tmp_path, caplog):
    write_synthetic_shards(tmp_path, train=1, val=3, views=3, resolution=8, shard_size=5)
    spoil_first_poses(tmp_path / "val-000000.tar")
    items = list(EvaluationSet(mixture(tmp_path), "val", 1, slice(2, 3)))
    assert [(item.ids[0], float(item.weight)) for item in items] == [
        ("val-ellipsoid-001", 0.0),
        ("val-ellipsoid-001", 1.0),
        ("val-ellipsoid-002", 1.0),
    ]
    assert "val-ellipsoid-000" in caplog.text


def test_a_split_without_readable_samples_raises_an_error(tmp_path):
    write_synthetic_shards(tmp_path, train=1, val=2, views=3, resolution=8, shard_size=1)
    for number in range(2):
        spoil_first_poses(tmp_path / f"val-{number:06d}.tar")
    items = EvaluationSet(mixture(tmp_path), "val", 1, slice(2, 3))
    for workers in (0, 1):
        with pytest.raises(InputError, match="found none among 2") as caught:
            next(iter(DataLoader(items, batch_size=None, num_workers=workers)))
        assert str(caught.value).startswith("expected a readable sample"), "not the traceback of the worker"
