"""What `data_tools validate` finds: each kind of damage by shard and sample, and nothing where all is well."""

import dataclasses
import io
import shutil
import tarfile

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.validate import check_pictures, hull_coverage, index_differences
from lrm_pl.data.manifest import read_index, read_manifest, write_manifest, write_shard
from lrm_pl.data.schema import SampleError, decode_image, encode_image, encode_sample
from lrm_pl.data.synthetic import synthetic_sample


def replaced(folder, change):
    """Write the first shard anew, with its first sample changed; manifest and index fit it."""
    manifest = read_manifest(folder)
    keys = list(read_index(folder, manifest.shards[0]))
    samples = [synthetic_sample(key, 8, 32, seed) for seed, key in enumerate(keys)]
    changed = encode_sample(samples[0])
    change(changed, samples[0])
    content = [(keys[0], changed), *((s.info.id, encode_sample(s)) for s in samples[1:])]
    shard = write_shard(folder, manifest.shards[0].name, "train", content)
    write_manifest(folder, dataclasses.replace(manifest, shards=(shard, *manifest.shards[1:])))


@pytest.fixture
def folder(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


def said(folder, capsys, status):
    assert main(["validate", "--shards", str(folder)]) == status
    return capsys.readouterr().out


def test_whole_shards_pass_and_the_next_command_is_said(folder, capsys):
    out = said(folder, capsys, 0)
    assert "6 objects in 3 shards: all right" in out
    assert f"make train DATA={folder}" in out


def test_a_flipped_byte_is_found_by_hash_and_by_sample(folder, capsys):
    shard = read_manifest(folder).shards[1]
    key, members = list(read_index(folder, shard).items())[1]
    offset, size = members["view_003.webp"]
    content = bytearray((folder / shard.name).read_bytes())
    content[offset + size // 2] ^= 255
    (folder / shard.name).write_bytes(bytes(content))
    out = said(folder, capsys, 1)
    assert f"{shard.name}: expected sha256 {shard.sha256} as in the manifest, found" in out
    assert f"{shard.name}: sample {key!r}: " in out
    assert "2 problems" in out


def _opengl(members, sample):
    c2w = sample.c2w.copy()
    c2w[:, :3, 1:3] *= -1
    members.update(encode_sample(dataclasses.replace(sample, c2w=c2w)))


def _pixels(members, sample):
    fxfycxcy = sample.fxfycxcy.copy()
    fxfycxcy[:, 2:] *= 32  # in pixels, and not divided by the size
    members.update(encode_sample(dataclasses.replace(sample, fxfycxcy=fxfycxcy)))


def _empty(members, sample):
    nothing = encode_image(np.zeros((32, 32, 4), dtype=np.uint8))
    members.update(encode_sample(dataclasses.replace(sample, views=(nothing,) * 8)))


def _two_sizes(members, sample):
    small = encode_image(np.full((16, 16, 4), 254, dtype=np.uint8))
    members["view_005.webp"] = small


def _no_view(members, sample):
    del members["view_005.webp"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_opengl, "cameras that fit the pictures, found that the hull of all views covers 0% of the object"),
        (_pixels, "cameras that fit the pictures"),
        (_empty, "expected an object, found 8 wholly transparent views"),
        (_two_sizes, "expected views of one size, found [(16, 16), (32, 32)]"),
        (_no_view, "its record says 8 views, but view_005.webp is missing"),
    ],
)
def test_a_bad_sample_is_named_with_its_shard(folder, capsys, change, message):
    replaced(folder, change)
    out = said(folder, capsys, 1)
    assert "train-000000.tar: sample 'train-ellipsoid-000': " in out
    assert message in out
    assert "1 problems, in 1 samples or shards" in out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../outside.json", tarfile.REGTYPE),
        ("/etc/passwd.json", tarfile.REGTYPE),
        ("a/b.json", tarfile.REGTYPE),
        ("link.json", tarfile.SYMTYPE),
        ("hard.json", tarfile.LNKTYPE),
        ("device.json", tarfile.CHRTYPE),
    ],
)
def test_members_that_leave_the_folder_links_and_devices_are_named(tmp_path, name, kind):
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        header = tarfile.TarInfo(name)
        header.type, header.linkname = (
            kind,
            "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else "",
        )
        tar.addfile(header, io.BytesIO())
    (difference,) = index_differences(path, {})
    assert name in difference


def test_an_index_that_points_elsewhere_is_named(shards):
    shard = read_manifest(shards).shards[0]
    index = read_index(shards, shard)
    assert not list(index_differences(shards / shard.name, index))
    key = next(iter(index))
    offset, size = index[key]["json"]
    index[key]["json"] = (offset + 512, size)
    (difference,) = index_differences(shards / shard.name, index)
    assert f"{key}.json" in difference


def test_the_hull_of_right_cameras_covers_the_object_and_another_convention_leaves_none():
    sample = synthetic_sample("a", 8, 32, 0)
    alphas = [decode_image("a", view)[..., 3] for view in sample.views]
    assert hull_coverage(sample.c2w, sample.fxfycxcy, alphas).min() > 0.95
    opengl = sample.c2w.copy()
    opengl[:, :3, 1:3] *= -1
    assert hull_coverage(opengl, sample.fxfycxcy, alphas).max() == 0


def test_more_pixels_than_an_object_may_have_are_not_all_decoded(monkeypatch):
    sample = synthetic_sample("a", views=8, resolution=32, seed=0)
    monkeypatch.setattr("data_tools.validate._MAX_PIXELS", 8 * 32 * 32)
    check_pictures(sample)
    monkeypatch.setattr("data_tools.validate._MAX_PIXELS", 8 * 32 * 32 - 1)
    with pytest.raises(
        SampleError, match="sample 'a': expected at most 8191 pixels in all views, found more"
    ):
        check_pictures(sample)
