import pytest

from lrm_pl.data.mixture import Entry
from lrm_pl.data.order import SampleLocation, SampleOrder, ShardReader
from lrm_pl.data.schema import SampleError
from lrm_pl.data.source import ShardSource
from lrm_pl.data.synthetic import synthetic_sample, write_synthetic_shards


def test_every_sample_comes_exactly_once_an_epoch():
    for counts, streams in (((8, 8, 8, 8, 8), 8), ((3, 1, 7), 4), ((2,), 64), ((5, 5), 1)):
        order = SampleOrder(counts, seed=3, streams=streams)
        for epoch in range(3):
            start = epoch * order.total
            places = [order.locate(g) for g in range(start, start + order.total)]
            assert {p.epoch for p in places} == {epoch}
            expected = {(s, i) for s, count in enumerate(counts) for i in range(count)}
            assert {(p.shard, p.index) for p in places} == expected
            assert len(places) == len(expected)


def test_the_sequence_by_hand():
    # One shard of 5 in 2 streams: stream 0 holds 0 1 2, stream 1 holds 3 4; positions alternate.
    order = SampleOrder((5,), seed=0, streams=2)
    assert [order.locate(g).index for g in range(5)] == [0, 3, 1, 4, 2]


def test_an_empty_shard_is_never_read():
    order = SampleOrder((2, 0, 3), seed=1, streams=2)
    assert all(order.locate(g).shard != 1 for g in range(50))


def test_epochs_differ_and_seeds_differ_but_a_repetition_is_the_same():
    def epoch(seed, number):
        order = SampleOrder((4, 4, 4, 4, 4, 4), seed, streams=4)
        return [order.locate(number * order.total + p) for p in range(order.total)]

    def plain(places):
        return [(p.shard, p.index) for p in places]

    assert epoch(0, 0) == epoch(0, 0)
    assert plain(epoch(0, 0)) != plain(epoch(0, 1))
    assert plain(epoch(0, 0)) != plain(epoch(1, 0))


def test_neighbours_come_from_different_parts_of_the_epoch():
    order = SampleOrder((8,) * 5, seed=0, streams=8)
    for g in range(0, 80, 4):
        batch = [order.locate(h) for h in range(g, g + 4)]
        assert len({(p.shard, p.index) for p in batch}) == 4
        assert len({p.shard for p in batch}) >= 2


def test_a_bad_sample_keeps_its_slot_filled_by_the_next_good_one_of_its_stream():
    order = SampleOrder((5,), seed=0, streams=2)  # indices 0 3 1 4 2
    messages = []

    def read(place: SampleLocation):
        if place.index in (0, 1):
            raise SampleError(f"sample {place.index} is bad")
        return synthetic_sample(str(place.index), views=1, resolution=4, seed=0)

    filled = [order.fill(g, read, messages.append).info.id for g in range(5)]
    assert filled[1] == "3"
    assert filled[3] == "4"
    assert filled[0] == filled[4] == "2", "stream 0 goes on with 2"
    assert messages[:2] == ["sample 0 is bad", "sample 1 is bad"]


def test_one_bad_sample_among_fewer_samples_than_streams_is_replaced_by_a_good_one():
    def read(place: SampleLocation):
        if place.index == 1:
            raise SampleError("bad")
        return place.index

    order = SampleOrder((4,), seed=0, streams=64)  # every stream holds one sample: its own cannot help
    filled = [order.fill(g, read, lambda message: None) for g in range(8)]
    assert 1 not in filled
    assert {0, 2, 3} <= set(filled)


def test_only_bad_samples_are_an_error_and_not_a_hang():
    def read(place: SampleLocation):
        raise SampleError("broken")

    with pytest.raises(
        SampleError, match=r"expected a readable sample, but found none among 5. The last: broken"
    ):
        SampleOrder((5,), seed=0, streams=2).fill(0, read, lambda message: None)


def test_a_reader_keeps_the_indices_of_so_many_shards_and_no_more(tmp_path):
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


def test_two_epochs_are_laid_out_at_a_time():
    order = SampleOrder((2, 3), seed=0, streams=2)
    places = [order.locate(g) for g in range(25)]
    assert list(order._layouts) == [3, 4]
    assert [order.locate(g) for g in (19, 20, 21)] == places[19:22], "around an epoch's end"
    assert list(order._layouts) == [3, 4]
    assert [SampleOrder((2, 3), 0, 2).locate(g) for g in range(25)] == places
