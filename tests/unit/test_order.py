import numpy as np

from lrm_pl.data.mixture import Entry
from lrm_pl.data.order import SampleLocation, SampleOrder
from lrm_pl.data.reader import PackedIndex, ShardReader
from lrm_pl.data.source import ShardSource
from lrm_pl.data.synthetic import write_synthetic_shards


def test_each_epoch_contains_every_sample_once():
    for counts, streams in (((8, 8, 8, 8, 8), 8), ((3, 1, 7), 4), ((2,), 64), ((5, 5), 1)):
        order = SampleOrder(counts, seed=3, streams=streams)
        for epoch in range(3):
            start = epoch * order.total
            places = [order.locate(g) for g in range(start, start + order.total)]
            assert {p.epoch for p in places} == {epoch}
            expected = {(s, i) for s, count in enumerate(counts) for i in range(count)}
            assert {(p.shard, p.index) for p in places} == expected
            assert len(places) == len(expected)


def test_locations_equal_hand_computed_values():
    # One shard of 5 in 2 streams: stream 0 holds the first 3 of the permuted samples, stream 1 the others.
    order = SampleOrder((5,), seed=0, streams=2)
    permuted = np.random.default_rng([0, 0, 0]).permutation(5)
    assert [order.locate(g).index for g in range(5)] == [permuted[i] for i in (0, 3, 1, 4, 2)]


def test_samples_of_a_shard_are_shuffled_in_each_epoch():
    order = SampleOrder((50,), seed=0, streams=1)
    epochs = [[order.locate(g).index for g in range(50 * e, 50 * e + 50)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    assert epochs[0] != epochs[1] != list(range(50))


def test_a_packed_index_uses_at_most_300_bytes_per_sample():
    names = ["c2w.npy", "fxfycxcy.npy", "json", "measures.json", *(f"view_{v:03d}.webp" for v in range(32))]
    index, offset = {}, 512
    for number in range(1000):
        members = {}
        for name in names:
            members[name] = (offset, 1000 * number + len(name))
            offset += 512 + -(-(1000 * number + len(name)) // 512) * 512
        index[f"object-{number:025d}"] = members
    packed = PackedIndex(index)
    assert packed.nbytes <= 300 * len(packed) == 300 * 1000
    assert all(packed.members(n) == index[packed.key(n)] for n in (0, 1, 500, 999))


def test_empty_shards_are_skipped():
    order = SampleOrder((2, 0, 3), seed=1, streams=2)
    assert all(order.locate(g).shard != 1 for g in range(50))


def test_the_order_depends_only_on_seed_and_epoch():
    def epoch(seed, number):
        order = SampleOrder((4, 4, 4, 4, 4, 4), seed, streams=4)
        return [order.locate(number * order.total + p) for p in range(order.total)]

    def plain(places):
        return [(p.shard, p.index) for p in places]

    assert epoch(0, 0) == epoch(0, 0)
    assert plain(epoch(0, 0)) != plain(epoch(0, 1))
    assert plain(epoch(0, 0)) != plain(epoch(1, 0))


def test_consecutive_samples_come_from_different_streams():
    order = SampleOrder((8,) * 5, seed=0, streams=8)
    for g in range(0, 80, 4):
        batch = [order.locate(h) for h in range(g, g + 4)]
        assert len({(p.shard, p.index) for p in batch}) == 4
        assert len({p.shard for p in batch}) >= 2


def test_candidates_are_the_sample_then_its_stream_then_all_other_samples():
    order = SampleOrder((5,), seed=0, streams=2)
    in_order = [order.locate(g) for g in range(5)]  # stream 0 holds positions 0 2 4, stream 1 holds 1 3
    assert list(order.candidates(2)) == [in_order[i] for i in (2, 4, 0, 1, 3)]
    assert list(order.candidates(3)) == [in_order[i] for i in (3, 1, 0, 2, 4)]
    assert {place.epoch for place in order.candidates(5 + 2)} == {1}
    single = SampleOrder((4,), seed=0, streams=64)  # each stream holds one sample
    assert all(len({p.index for p in single.candidates(g)}) == 4 for g in range(8))


def test_a_reader_keeps_a_limited_number_of_indices(tmp_path):
    write_synthetic_shards(tmp_path, train=6, val=0, views=3, resolution=8, shard_size=1)
    source, read = ShardSource(str(tmp_path)), []
    index = source.index
    source.index = lambda shard: read.append(shard.name) or index(shard)
    entries = [Entry(source, shard, 0) for shard in source.manifest().split("train")]
    reader = ShardReader(entries, kept=3)
    for shard in (0, 1, 2, 0, 3, 0, 1):
        assert reader.read(SampleLocation(0, shard, 0), [0]).info.id == reader.keys(shard)[0]
    assert read == [f"train-{n:06d}.tar" for n in (0, 1, 2, 3, 1)], (
        "the one that was read least recently goes"
    )
    assert len(reader._indices) == 3


def test_the_permutations_of_two_epochs_are_cached():
    order = SampleOrder((2, 3), seed=0, streams=2)
    places = [order.locate(g) for g in range(25)]
    assert list(order._layouts) == [3, 4]
    assert [order.locate(g) for g in (19, 20, 21)] == places[19:22], "around an epoch's end"
    assert list(order._layouts) == [3, 4]
    assert [SampleOrder((2, 3), 0, 2).locate(g) for g in range(25)] == places
