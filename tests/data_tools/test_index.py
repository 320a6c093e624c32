"""Shards written with plain webdataset train after ``python -m data_tools index``; plain webdataset reads ours."""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch
import webdataset

from data_tools.__main__ import main
from data_tools.shards.index import index_folder
from lrm_pl.data.datamodule import ShardDataModule
from lrm_pl.data.manifest import ShardError, read_index, read_manifest
from lrm_pl.data.schema import SampleError, decode_sample, encode_sample
from lrm_pl.data.synthetic import synthetic_sample, write_synthetic_shards
from lrm_pl.data.tar import scan_tar
from lrm_pl.data.transforms import CropConfig
from lrm_pl.errors import InputError

# webdataset leaves the files that it opens to the garbage collector
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)

KEYS = [f"object-{number}" for number in range(6)]


def sample(key):
    return synthetic_sample(key, views=8, resolution=32, seed=0)


def write(folder, pattern, keys, **options):
    with webdataset.ShardWriter(str(folder / pattern), maxcount=2, verbose=0, **options) as writer:
        for key in keys:
            writer.write({"__key__": key, **encode_sample(sample(key))})


@pytest.fixture
def foreign(tmp_path):
    """Two training shards and one validation shard, as others write them."""
    write(tmp_path, "shard-%06d.tar", KEYS[:4])
    write(tmp_path, "val-%06d.tar", KEYS[4:])
    return tmp_path


def batches(folder, **options):
    data = ShardDataModule(
        str(folder), batch_size=2, workers=0, crop=CropConfig(16, 32, 16), seed=0, **options
    )
    data.trainer = types.SimpleNamespace(
        max_steps=4, global_rank=0, world_size=1, accumulate_grad_batches=1, global_step=0,
        strategy=types.SimpleNamespace(root_device=torch.device("cpu")),
    )  # fmt: skip
    data.setup("fit")
    return [batch.to("cpu") for batch in data.train_dataloader()], data


def test_shards_from_plain_webdataset_can_be_used_after_indexing(foreign, capsys):
    assert main(["index", str(foreign)]) == 0
    assert "6 objects in 3 shards" in capsys.readouterr().out
    manifest = read_manifest(foreign)
    assert (manifest.views, manifest.resolution) == (8, 32)
    assert [shard.split for shard in manifest.shards] == ["train", "train", "val"]
    found, data = batches(foreign)
    assert sorted(key for batch in found[:2] for key in batch.ids) == KEYS[:4]
    assert not any(met for batch in found for met in batch.faults)
    assert [key for batch in data.evaluation_loader("heldout") for key in batch.ids] == KEYS[4:]
    with pytest.raises(
        InputError, match=r"without manifest\.json, but found manifest\.json\. Delete manifest"
    ):
        index_folder(foreign)


def test_plain_webdataset_reads_rendered_shards(tmp_path):
    write_synthetic_shards(tmp_path, train=3, val=0, views=4, resolution=16, shard_size=3)
    found = list(webdataset.WebDataset(str(tmp_path / "train-000000.tar"), shardshuffle=False))
    assert [one["__key__"] for one in found] == [f"train-ellipsoid-00{n}" for n in range(3)]
    for one in found:
        assert len(decode_sample(one["__key__"], one).views) == 4


def test_the_member_index_matches_the_tar_headers(tmp_path):
    manifest = write_synthetic_shards(tmp_path, train=3, val=1, views=4, resolution=16)
    for shard in manifest.shards:
        assert scan_tar(tmp_path / shard.name) == read_index(tmp_path, shard)


def cut(content):
    return content[: len(content) // 2]


def without_end(content):
    return content.rstrip(b"\0") + bytes(512 - len(content.rstrip(b"\0")) % 512)


def bad_header(content):
    at = content.index(b"object-1.json")
    return content[:at] + bytes(8) + content[at + 8 :]


def bad_image(content):
    at = content.index(b"RIFF")
    return content[:at] + b"XXXX" + content[at + 4 :]


@pytest.mark.parametrize("damage", [cut, without_end, bad_header, bad_image])
def test_index_rejects_damaged_shards(foreign, damage):
    path = foreign / "shard-000000.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ShardError, match=r"shard-000000\.tar"):
        index_folder(foreign)
    assert not (foreign / "manifest.json").exists()


def test_index_rejects_duplicate_keys_and_different_views(foreign):
    write(foreign, "again-%06d.tar", KEYS[:1])
    with pytest.raises(ShardError, match="unique sample keys, but found 'object-0' 2 times"):
        index_folder(foreign)
    (foreign / "again-000000.tar").unlink()
    with webdataset.TarWriter(str(foreign / "few.tar")) as writer:
        writer.write({"__key__": "few", **encode_sample(synthetic_sample("few", 3, 32, 0))})
    with pytest.raises(ShardError, match=r"3 views of 32 x 32 pixels and 8 views"):
        index_folder(foreign)


def paint_red(sample):
    images = [np.concatenate([image[..., :1] * 0 + 255, image[..., 1:]], axis=-1) for image in sample.images]
    return dataclasses.replace(sample, images=images)


class Reject:
    """Reject one object: with an error, or without a word."""

    def __init__(self, key: str, silent: bool) -> None:
        self.key, self.silent = key, silent

    def __call__(self, sample):
        if sample.info.id != self.key:
            return sample
        if self.silent:
            return None
        raise SampleError(f"sample {self.key!r}: expected another object")


def test_stages_run_between_decoding_and_augmentation(foreign):
    index_folder(foreign)
    found, _ = batches(foreign, stages=[paint_red])
    for batch in found:
        target = batch.target
        inside = target.alpha == 1
        assert inside.any()
        assert (target.images[:, :, 0][inside] > 0.999).all()


@pytest.mark.parametrize("silent", [True, False])
def test_a_sample_that_a_stage_rejects_is_replaced_and_counted(foreign, silent):
    index_folder(foreign)
    whole, _ = batches(foreign)
    found, _ = batches(foreign, stages=[Reject("object-1", silent)])
    for before, after in zip(whole, found, strict=True):
        for key, other, met in zip(before.ids, after.ids, after.faults, strict=True):
            assert (other == key) == (not met) == (key != "object-1")
            assert not met or "'object-1'" in met[0]


def test_stages_are_set_in_a_config(foreign, tmp_path, capsys):
    from lrm_pl.cli.main import main as lrm

    stages = [
        "tests.data_tools.test_index.paint_red",
        {
            "class_path": "tests.data_tools.test_index.Reject",
            "init_args": {"key": "object-1", "silent": True},
        },
    ]
    with pytest.raises(SystemExit):
        lrm(["fit", f"--data.stages={json.dumps(stages)}", "--print_config"])
    printed = capsys.readouterr().out
    assert "tests.data_tools.test_index.paint_red" in printed
    assert "key: object-1" in printed
