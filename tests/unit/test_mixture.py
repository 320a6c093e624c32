"""Weighted mixtures of data sets."""

import collections

import pytest
import torch

from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.manifest import ShardError
from lrm_pl.data.mixture import DataSet, Mixture
from lrm_pl.data.stream import BatchPartition, EvaluationSet, TrainingStream
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.data.transforms import Augmentation, CropConfig
from lrm_pl.errors import InputError


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two data sets with three objects of 6 views and two objects of 4 views, which have the same keys."""
    folders = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    write_synthetic_shards(folders[0], train=3, val=1, views=6, resolution=16, shard_size=2)
    write_synthetic_shards(folders[1], train=2, val=2, views=4, resolution=16, shard_size=2)
    return folders


def mixed(two, weights=(1, 3)):
    return Mixture([DataSet(str(folder), weight) for folder, weight in zip(two, weights, strict=True)])


def stream(mixture, share, steps, position=0):
    augmentation = Augmentation(CropConfig(16, 16, 16))
    return TrainingStream(mixture, share, 1, 1, 1, None, augmentation, 0, 4, steps, 0, position)


def test_an_object_appears_as_often_per_epoch_as_its_weight(two):
    run = stream(mixed(two), BatchPartition(1), steps=9)
    assert run.order.total == 3 * 1 + 2 * 3
    places = [run.order.locate(g) for g in range(3 * 9)]
    entries = run.reader.entries
    for epoch in range(3):
        came = collections.Counter(
            (entries[p.shard].source.location, run.reader.keys(p.shard)[p.index])
            for p in places
            if p.epoch == epoch
        )
        first, second = str(two[0]), str(two[1])
        assert {name: count for (folder, name), count in came.items() if folder == first} == {
            f"train-ellipsoid-00{i}": 1 for i in range(3)
        }
        assert {name: count for (folder, name), count in came.items() if folder == second} == {
            f"train-ellipsoid-00{i}": 3 for i in range(2)
        }


def test_a_mixture_does_not_depend_on_ranks_and_start_position(two):
    whole = [key for batch in stream(mixed(two), BatchPartition(3), steps=6) for key in batch.ids]
    dealt = [
        batch.ids[0] for rank in range(3) for batch in stream(mixed(two), BatchPartition(3, rank, 3), steps=6)
    ]
    assert sorted(dealt) == sorted(whole)
    assert [key for batch in stream(mixed(two), BatchPartition(3), 4, 6) for key in batch.ids] == whole[6:]


def test_repetitions_of_an_object_in_an_epoch_differ(two):
    run = stream(mixed(two), BatchPartition(1), steps=9)
    places = [run.order.locate(g) for g in range(9)]
    again = [
        g
        for g, p in enumerate(places)
        if run.reader.entries[p.shard].source.location == str(two[1]) and p.index == 0
    ]
    assert len(again) == 3
    backgrounds = [
        batch.to("cpu").target.background[0]
        for g in again
        for batch in stream(mixed(two), BatchPartition(1), 1, g)
    ]
    assert not any(torch.equal(backgrounds[a], backgrounds[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_evaluation_contains_every_object_once_with_its_last_views(two):
    items = list(EvaluationSet(mixed(two), "train", 1, slice(-1, None)))
    assert len(items) == 5
    assert all(item.target.rgba.shape[0] == 1 for item in items)
    counts = [item.target.rgba.shape[0] for item in EvaluationSet(mixed(two), "train", 1, slice(None, -1))]
    assert counts == [5, 5, 5, 3, 3], "6 and 4 views an object, the last one left out"


def test_empty_training_splits_and_invalid_weights_raise_an_error(two, tmp_path):
    write_synthetic_shards(tmp_path, train=0, val=2, views=4, resolution=16)
    with pytest.raises(
        ShardError, match=rf"{tmp_path}: expected samples in the split 'train', but found none"
    ):
        stream(mixed([two[0], tmp_path], (1, 1)), BatchPartition(1), 1)
    with pytest.raises(InputError, match=r"a weight of at least 1, but found .*weight=0"):
        DataSet("somewhere", 0)
    with pytest.raises(
        InputError, match=r"found train-000000.tar in both .* List each data set once, with its weight"
    ):
        mixed([two[0], f"{two[0]}/"], (1, 1))
    with pytest.raises(ShardError, match=r"expected at least 10 samples .* found 9\. .*--data.batch_size 9"):
        stream(mixed(two), BatchPartition(10), 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("workers", -1),
        ("streams", 0),
        ("unseen_views", 0),
        ("side_views", -1),
        ("input_pool", 0),
        ("seed", -1),
    ],
)
def test_invalid_options_raise_an_error_with_the_option_name(name, value):
    with pytest.raises(
        InputError, match=f"expected a data.{name} of at least {value + 1}, but found {value}"
    ):
        ShardDataModule("unread", **{name: value})
