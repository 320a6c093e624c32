"""Shards made into others: what changes, what keeps its bytes, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.quality.measures import encode_measures
from data_tools.quality.validate import validate
from data_tools.rendering.shard_folder import read_failures
from data_tools.shards.repack import RepackError, repack, resized
from lrm_pl.data.manifest import ShardError, read_index, read_manifest, write_manifest
from lrm_pl.data.mixture import DataSet, Mixture
from lrm_pl.data.schema import decode_image, encode_image
from lrm_pl.data.stream import EvaluationSet
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.data.tar import write_shard
from lrm_pl.errors import InputError
from lrm_pl.paths import hash_file
from tests.builders import members, spoil_first_poses
from tests.data_tools.stand_in_worker import MEASURES


def test_repack_changes_the_shard_size_and_keeps_bytes_and_splits(shards, tmp_path):
    manifest = repack([shards], tmp_path / "out", shard_size=3)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("train-000000.tar", 3), ("train-000001.tar", 1), ("val-000000.tar", 2),
    ]  # fmt: skip
    assert members(tmp_path / "out") == members(shards)
    assert validate(tmp_path / "out") == 0
    assert (tmp_path / "out" / "contact_sheet.png").is_file()
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]


def test_repack_resizes_images_and_keeps_the_other_members(shards, tmp_path):
    repack([shards], tmp_path / "out", resolution=16)
    for key, (split, content) in members(shards).items():
        again_split, again = members(tmp_path / "out")[key]
        assert again_split == split
        for name in content:
            if name.startswith("view_"):
                assert decode_image(key, again[name]).shape == (16, 16, 4)
            else:
                assert again[name] == content[name]
    assert validate(tmp_path / "out") == 0
    assert read_manifest(tmp_path / "out").render["resolution"] == 16


def test_resizing_averages_premultiplied_colors():
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[0, 0] = (200, 100, 50, 255)
    rgba[0, 1] = (0, 255, 0, 0)  # of no color where nothing is
    rgba[2:4, 2:4] = (10, 20, 30, 255)
    small = decode_image("a", resized("a", encode_image(rgba), 4))
    assert small[0, 0, 3] in (63, 64), "a quarter is covered"
    assert np.abs(small[0, 0, :3].astype(int) - (200, 100, 50)).max() <= 4, "its color is that of the part"
    assert small[1, 1].tolist() == [10, 20, 30, 255]
    assert small[3, 3].tolist() == [0, 0, 0, 0]
    same = encode_image(rgba)
    assert resized("a", same, 8) is same
    with pytest.raises(RepackError, match=r"at least 16 x 16 pixels, but found 8 x 8 pixels\. Use a smaller"):
        resized("a", same, 16)


def test_repack_selects_the_same_validation_split_as_the_renderer(shards, tmp_path):
    repack([shards], tmp_path / "out", held_out=3)
    from data_tools.rendering.shard_plan import held_out_ids

    found = members(tmp_path / "out")
    assert {key for key, (split, _) in found.items() if split == "val"} == held_out_ids(list(found), 3)
    with pytest.raises(InputError, match="--held-out between 0 and 5"):
        repack([shards], tmp_path / "other", held_out=6)


def test_merge_rejects_duplicate_ids_and_different_views(shards, tmp_path, capsys):
    other = tmp_path / "other"
    write_synthetic_shards(other, train=2, val=0, views=8, resolution=32, shard_size=1)
    with pytest.raises(
        RepackError,
        match=r"'train-ellipsoid-000' in .*shards.* and in .*other\. Use `--data\.also`",
    ):
        repack([shards, other], tmp_path / "out")
    few = tmp_path / "few"
    write_synthetic_shards(few, train=1, val=0, views=3, resolution=32)
    with pytest.raises(RepackError, match=r"the same views, but found 8 in .*, 3 in .*few"):
        repack([shards, few], tmp_path / "out")
    large = tmp_path / "large"
    write_synthetic_shards(large, train=2, val=0, views=8, resolution=64, seed=9)
    for folder, resolution in ((small := tmp_path / "small", 32), (large, 64)):
        if folder == small:
            shutil.copytree(shards, small)
        write_manifest(folder, dataclasses.replace(read_manifest(folder), render={"resolution": resolution}))
    with pytest.raises(
        RepackError, match=r"the same resolution, but found 32 in .*, 64 in .*large\. Use --res 32 to resize"
    ):
        repack([small, large], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    only_val = tmp_path / "only-val"
    repack([shards], only_val, held_out=0)
    assert {split for split, _ in members(only_val).values()} == {"train"}
    assert main(["merge", "--shards", str(shards), "--out", str(tmp_path / "out")]) == 0
    assert f"make train DATA={tmp_path / 'out'}" in capsys.readouterr().out
    assert main(["merge", "--shards", str(shards), "--out", str(tmp_path / "out")]) == 1
    assert "because it exists" in capsys.readouterr().err


def rendered(folder, **render):
    """Say what a folder's manifest says of how it was rendered."""
    write_manifest(folder, dataclasses.replace(read_manifest(folder), render=render))
    return folder


@pytest.fixture
def other(shards, tmp_path):
    """A folder of the same kind with objects of other names."""
    names = ("first", "second")
    content = [members(shards)[key][1] for key in sorted(members(shards))[:2]]
    (folder := tmp_path / "others").mkdir()

    def renamed():
        for name, sample in zip(names, content, strict=True):
            info = json.loads(sample["json"]) | {"id": name}
            yield name, sample | {"json": json.dumps(info).encode()}

    shard = write_shard(folder, "train-000000.tar", "train", renamed())
    write_manifest(folder, dataclasses.replace(read_manifest(shards), shards=(shard,)))
    return folder


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("preset", "gso-orbit", "frame"),
        ("preset", "frame", None),
        ("radius_range", [2.5, 2.5], [2.4, 2.8]),
        ("height_range", [0.0, 0.0], [-0.75, 1.6]),
        ("fov_range_deg", [50.0, 50.0], [67.38, 67.38]),
        ("depth", True, False),
        ("normals", True, None),
        ("surface", True, False),
    ],
)
def test_merge_rejects_different_cameras_and_geometry(shards, other, tmp_path, name, one, two):
    first = rendered(shutil.copytree(shards, tmp_path / "first"), **{name: one})
    rendered(other, **({} if two is None else {name: two}))
    with pytest.raises(
        RepackError,
        match=f"the same {name}, but found .* in .*first, .* in .*others. Use `--data.also` to train",
    ):
        repack([first, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_keeps_only_settings_that_all_folders_share(shards, other, tmp_path):
    same = {"preset": "frame", "depth": False, "resolution": 32}
    first = rendered(shutil.copytree(shards, tmp_path / "first"), **same, seed=0, renderer="a", samples=4)
    rendered(other, **same, seed=1, renderer="a")
    render = repack([first, other], tmp_path / "out").render
    assert {name: render[name] for name in same} == same
    assert render["renderer"] == "a"
    assert not {"seed", "samples"} & set(render)
    assert set(members(tmp_path / "out")) == set(members(shards)) | {"first", "second"}


def test_repack_rejects_a_damaged_sample_and_writes_no_folder(shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    spoil_first_poses(broken / "train-000000.tar")
    manifest = read_manifest(broken)
    first = dataclasses.replace(manifest.shards[0], sha256=hash_file(broken / "train-000000.tar"))
    write_manifest(broken, dataclasses.replace(manifest, shards=(first, *manifest.shards[1:])))
    with pytest.raises(ValueError, match=r"train-000000\.tar: sample 'train-ellipsoid-000'"):
        repack([broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def flip_a_pixel(folder):
    """Flip a bit of an image that still decodes."""
    shard = read_manifest(folder).shards[0]
    offset, size = read_index(folder, shard)["train-ellipsoid-000"]["view_003.webp"]
    content = bytearray((folder / shard.name).read_bytes())
    content[offset + size * 7 // 10] ^= 16
    (folder / shard.name).write_bytes(bytes(content))


def exchange_two_views(folder):
    """Make an index point to each of two views as the other."""
    path = folder / "train-000000.index.json"
    index = json.loads(path.read_text())
    members = index["train-ellipsoid-000"]
    members["view_000.webp"], members["view_001.webp"] = members["view_001.webp"], members["view_000.webp"]
    path.write_text(json.dumps(index))


def say_fewer_views(folder):
    write_manifest(folder, dataclasses.replace(read_manifest(folder), views=7))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_pixel, "expected sha256 .* as in the manifest, but found .*validate --shards"),
        (exchange_two_views, r"the members and offsets in train-000000\.index\.json, but found others"),
        (say_fewer_views, "expected 7 views as in the manifest, but found 8"),
    ],
)
def test_repack_rejects_shards_that_differ_from_the_manifest(shards, tmp_path, damage, message):
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    damage(broken)
    with pytest.raises(ShardError, match=rf"train-000000\.tar: .*{message}"):
        repack([broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_rejects_views_of_different_sizes(shards, tmp_path):
    large = tmp_path / "large"
    write_synthetic_shards(large, train=2, val=0, views=8, resolution=64, seed=9)
    (few := tmp_path / "few").mkdir()
    samples = [(key, content) for key, (_, content) in members(shards).items() if key.startswith("val")]
    shard = write_shard(few, "train-000000.tar", "train", samples)
    write_manifest(few, dataclasses.replace(read_manifest(shards), shards=(shard,)))
    with pytest.raises(
        RepackError, match=r"found 64 x 64 pixels in 'train.*', 32 x 32 pixels in 'val.*--res N"
    ):
        repack([large, few], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("resolution", [None, 16])
def test_repack_keeps_custom_members(shards, tmp_path, resolution):
    source = tmp_path / "source"
    source.mkdir()
    samples = [
        (key, content | dict.fromkeys(["caption.txt", "view_labels.json"], key.encode()))
        for key, (_, content) in members(shards).items()
    ]
    shard = write_shard(source, "train-000000.tar", "train", samples)
    write_manifest(source, dataclasses.replace(read_manifest(shards), shards=(shard,)))
    repack([source], tmp_path / "out", resolution)
    for key, (_, content) in members(tmp_path / "out").items():
        assert content["caption.txt"] == content["view_labels.json"] == key.encode()
    items = list(EvaluationSet(Mixture([DataSet(str(tmp_path / "out"))]), "train", 1, slice(-1, None)))
    assert [float(item.weight) for item in items] == [1.0] * len(samples), "they are no views"


def test_repack_copies_the_failures(shards, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(shards, source)
    record = {"id": "b", "file": "b.glb", "reason": "is empty"}
    (source / "failures.jsonl").write_text(json.dumps(record) + "\n")
    assert repack([source], tmp_path / "out").failures == 1
    assert read_failures(tmp_path / "out") == {"b": record}


def measured(shards, out):
    """Copy a folder with measures in every sample; the first object is white and was rejected."""
    out.mkdir()
    content = members(shards)
    first, *rest = sorted(key for key, (split, _) in content.items() if split == "train")
    val = sorted(key for key, (split, _) in content.items() if split == "val")

    def sample(key):
        measures = encode_measures(dataclasses.replace(MEASURES, white=1.0 if key == first else 0.0))
        return key, content[key][1] | {"measures.json": measures}

    written = [
        write_shard(out, "train-000000.tar", "train", map(sample, rest)),
        write_shard(out, "rejected-train-000000.tar", "train", [sample(first)], rejected=True),
        write_shard(out, "val-000000.tar", "val", map(sample, val)),
    ]
    write_manifest(out, dataclasses.replace(read_manifest(shards), shards=tuple(written)))
    return first


def test_rules_select_among_accepted_and_rejected_objects(shards, tmp_path, capsys):
    first = measured(shards, tmp_path / "in")
    assert validate(tmp_path / "in") == 0
    everything = set(members(shards))
    repack([tmp_path / "in"], tmp_path / "as-it-was")
    assert set(members(tmp_path / "as-it-was")) == everything - {first}
    assert "5 objects in 2 shards, 1 skipped" in capsys.readouterr().out
    repack([tmp_path / "in"], tmp_path / "all", rules=["white <= 1"])
    assert members(tmp_path / "all") == members(tmp_path / "in")  # each in its split again, with its measures
    repack([tmp_path / "in"], tmp_path / "white", rules=["white == 1"])
    assert set(members(tmp_path / "white")) == {first}
    assert read_manifest(tmp_path / "white").render["rules"] == ["white == 1"]
    with pytest.raises(
        RepackError, match="expected objects that satisfy white > 1, but found none among 6 objects"
    ):
        repack([tmp_path / "in"], tmp_path / "none", rules=["white > 1"])
    with pytest.raises(
        RepackError, match="expected measures of all objects, but found no measures of 'train-ellipsoid-000'"
    ):
        repack([shards], tmp_path / "unmeasured", rules=["white < 1"])
