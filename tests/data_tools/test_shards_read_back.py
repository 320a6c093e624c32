"""The shard format, written as rendering writes it and read as others read it; no Blender."""

import dataclasses
import gc
import io
import json
import zlib

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_tools.rendering.cameras import PRESETS, draw_cameras
from lrm_pl.data.manifest import Manifest, ShardError, read_index, read_manifest, write_manifest
from lrm_pl.data.schema import (
    Sample,
    SampleError,
    SampleInfo,
    decode_image,
    decode_sample,
    encode_image,
    encode_sample,
)
from lrm_pl.data.tar import write_shard

VIEWS = 3


def make_sample(key="chair", views=VIEWS):
    cameras = draw_cameras(PRESETS["frame"], views, np.random.default_rng(1))
    rgba = np.arange(views * 8 * 8 * 4, dtype=np.uint32).reshape(views, 8, 8, 4).astype(np.uint8)
    info = SampleInfo(key, "Chair", "CC0-1.0", "Ann", "library", 7, "blender", views)
    return Sample(info, cameras.c2w, cameras.fxfycxcy, tuple(encode_image(image) for image in rgba))


@pytest.fixture
def folder(tmp_path):
    keys = ("bed", "chair")
    shard = write_shard(
        tmp_path, "train-000000.tar", "train", [(key, encode_sample(make_sample(key))) for key in keys]
    )
    write_manifest(tmp_path, Manifest((shard,), VIEWS, 0, {"preset": "frame"}))
    return tmp_path


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_the_shards(folder):
    expected = make_sample("bed")
    found = list(webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False).decode("rgba8"))
    assert [sample["__key__"] for sample in found] == ["bed", "chair"]
    assert found[0]["json"]["name"] == "Chair"
    np.testing.assert_array_equal(found[0]["c2w.npy"], expected.c2w)
    np.testing.assert_array_equal(found[0]["fxfycxcy.npy"], expected.fxfycxcy)
    np.testing.assert_array_equal(found[0]["view_002.webp"], decode_image("bed", expected.views[2]))
    gc.collect()  # webdataset leaves the tar open: let that warning come here, where it is ignored


def test_a_sample_comes_back_by_its_offsets_and_equal_samples_are_equal_bytes(folder, tmp_path):
    manifest = read_manifest(folder)
    raw = (folder / "train-000000.tar").read_bytes()
    members = read_index(folder, manifest.shards[0])["chair"]
    found = decode_sample("chair", {name: raw[at : at + size] for name, (at, size) in members.items()})
    expected = make_sample("chair")
    assert found.info == expected.info
    assert found.views == expected.views
    np.testing.assert_array_equal(found.c2w, expected.c2w)
    again = tmp_path / "again"
    again.mkdir()
    samples = [(key, encode_sample(make_sample(key))) for key in ("bed", "chair")]
    assert write_shard(again, "train-000000.tar", "train", samples) == manifest.shards[0]
    assert (again / "train-000000.tar").read_bytes() == raw


def test_a_truncated_shard_is_named_with_both_sizes(folder):
    tar = folder / "train-000000.tar"
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(
        ShardError,
        match=rf"train-000000.tar: expected {size} bytes, but found a damaged file of {size - 512} bytes",
    ):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000000.index.json"])
def test_a_missing_shard_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ShardError, match=f"expected the shard file .*{name}, but found none"):
        read_manifest(folder)


def test_a_folder_without_manifest_is_not_finished(tmp_path):
    with pytest.raises(ShardError, match=r"found no manifest.json. Run `make render-shards"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("views", "8", "found the value '8' for views"),
        ("failures", None, "found the value None for failures"),
        ("render", [1], r"found the value \[1\] for render"),
        ("shards", [], "expected a valid manifest of shards, but found no samples"),
    ],
)
def test_a_manifest_of_other_fields_or_of_nothing_is_refused(folder, name, value, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ShardError, match=rf"manifest\.json: .*{message}"):
        read_manifest(folder)


def test_a_manifest_that_lists_a_shard_twice_is_refused(folder):
    record = json.loads((folder / "manifest.json").read_text())
    record["shards"] *= 2
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ShardError, match=r"found two entries for the shard train-000000\.tar"):
        read_manifest(folder)


def test_unknown_schema_versions_are_refused_by_number(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ShardError, match="expected schema version 2, but found 99"):
        read_manifest(folder)
    members = encode_sample(make_sample())
    members["json"] = json.dumps(json.loads(members["json"]) | {"schema_version": 99}).encode()
    with pytest.raises(SampleError, match="expected schema version 2, but found 99"):
        decode_sample("chair", members)


@pytest.mark.parametrize("fault", ["scaled", "mirrored", "last row", "nan"])
def test_a_camera_that_is_not_rigid_is_refused(fault):
    sample = make_sample()
    c2w = sample.c2w.copy()
    if fault == "scaled":
        c2w[1, :3, :3] *= 1.001
    elif fault == "mirrored":
        c2w[1, :3, 0] *= -1
    elif fault == "last row":
        c2w[1, 3, 0] = 0.01
    else:
        c2w[1, 0, 0] = np.nan
    with pytest.raises(SampleError, match="'chair': expected rigid poses"):
        encode_sample(dataclasses.replace(sample, c2w=c2w))


def test_differing_numbers_of_views_are_refused():
    sample = make_sample()
    with pytest.raises(SampleError, match=r"expected each of 3 views once, but found no view_002\.webp"):
        encode_sample(dataclasses.replace(sample, views=sample.views[:2]))
    with pytest.raises(SampleError, match=r"expected c2w.npy of shape \(3, 4, 4\)"):
        encode_sample(dataclasses.replace(sample, c2w=sample.c2w[:2]))
    members = encode_sample(sample)
    with pytest.raises(SampleError, match=r"found no view_002\.webp"):
        decode_sample("chair", {name: data for name, data in members.items() if name != "view_002.webp"})
    with pytest.raises(SampleError, match=r"found the additional member view_003\.webp"):
        decode_sample("chair", members | {"view_003.webp": sample.views[0]})


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_an_image_that_is_not_rgba_is_refused(mode):
    buffer = io.BytesIO()
    Image.new(mode, (8, 8)).save(buffer, format="PNG")
    with pytest.raises(
        SampleError, match=f"expected RGBA views, but found mode {mode}. Render the views with an alpha"
    ):
        decode_image("chair", buffer.getvalue())


def test_bytes_that_are_no_image_are_refused():
    with pytest.raises(SampleError, match="expected a PNG or WebP view, but found 7 bytes"):
        decode_image("chair", b"garbage")
    with pytest.raises(SampleError, match="expected a PNG or WebP view"):
        decode_image("chair", make_sample().views[0][:30])


def _array(header, content=b""):
    """Bytes of a .npy with a header of one's own."""
    text = header.ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (_array("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4, 4)}"), "shape (1000000000000"),
        (_array("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4, 4)}", bytes(100)), "found 100"),
        (_array("{'descr': '<f4', 'fortran_order': True, 'shape': (3, 4, 4)}", bytes(192)), "in Fortran order"),
        (_array("{'descr': '|O', 'fortran_order': False, 'shape': (3, 4, 4)}", bytes(192)), "object"),
        (_array("__import__('os').system('true')"), "expected a numpy array"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "expected a numpy array"),
        (b"", "expected a numpy array"),
    ],
)  # fmt: skip
def test_an_array_is_refused_by_its_header_before_anything_is_allocated(array, message):
    members = encode_sample(make_sample()) | {"c2w.npy": array}
    with pytest.raises(SampleError, match="sample 'chair'") as error:
        decode_sample("chair", members)
    assert message in str(error.value)


def _large_png():
    bomb = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(bomb, "PNG")
    content = bytearray(bomb.getvalue())
    content[16:24] = (8192).to_bytes(4, "big") * 2  # width and height in the header
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def _large_webp():
    content = bytearray(make_sample().views[0])
    content[21:25] = (8191 | 8191 << 14 | 1 << 28).to_bytes(
        4, "little"
    )  # width - 1, height - 1, alpha is used
    return bytes(content)


def _large_webp_of_parts(**options):
    """Make a WebP whose first chunk names a canvas (VP8X), or one that loses something (VP8)."""
    buffer = io.BytesIO()
    Image.new("RGB" if "lossless" not in options else "RGBA", (8, 8)).save(buffer, "WEBP", **options)
    content = bytearray(buffer.getvalue())
    if content[12:16] == b"VP8X":
        content[24:30] = (8191).to_bytes(3, "little") * 2
    else:
        assert content[12:16] == b"VP8 "
        content[26:30] = (8192).to_bytes(2, "little") * 2
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        _large_png(),
        _large_webp(),
        _large_webp_of_parts(),
        _large_webp_of_parts(lossless=True, xmp=b"<x/>"),
    ],
    ids=["png", "lossless", "lossy", "extended"],
)
def test_an_image_is_refused_by_its_size_before_it_is_decoded(content, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(SampleError, match=r"at most 4096 pixels per side, but found \(8192, 8192\)"):
        decode_image("chair", content)


@pytest.mark.parametrize("alpha", [slice(0, 256), slice(255, 256)], ids=["any alpha", "opaque"])
def test_every_pixel_of_a_view_comes_back_also_a_color_that_alpha_hides(alpha):
    rng = np.random.default_rng(3)
    rgba = rng.integers(0, 256, (40, 56, 4), dtype=np.uint8)
    rgba[..., 3] = rng.integers(alpha.start, alpha.stop, (40, 56))
    rgba[:20, :20, 3] = alpha.start
    np.testing.assert_array_equal(decode_image("chair", encode_image(rgba)), rgba)


def test_a_view_that_is_cut_off_anywhere_is_refused():
    view = make_sample().views[0]
    for end in range(0, len(view) - 1, 7):
        with pytest.raises(SampleError, match="sample 'chair'"):
            decode_image("chair", view[:end])


def test_an_index_with_a_member_larger_than_any_view_is_refused(folder):
    path = folder / "train-000000.index.json"
    index = json.loads(path.read_bytes())
    index["chair"]["json"][1] = 2**30
    path.write_text(json.dumps(index))
    with pytest.raises(
        ShardError, match=r"found a member of 1073741824 bytes, which exceeds the maximum of 67108864"
    ):
        read_index(folder, read_manifest(folder).shards[0])


def test_no_flipped_bit_in_the_header_of_an_array_is_more_than_a_bad_sample():
    members = encode_sample(make_sample())
    header = len(members["c2w.npy"]) - 4 * 16 * VIEWS
    refused = 0
    for bit in range(8 * header):
        content = bytearray(members["c2w.npy"])
        content[bit // 8] ^= 1 << bit % 8
        try:
            decode_sample("chair", members | {"c2w.npy": bytes(content)})
        except SampleError:
            refused += 1
    assert refused > 4 * header  # some are in its padding


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"chair": {"json": [1e999, 4]}}', b"\xff", b"[]"])
def test_json_that_is_none_is_refused_wherever_it_stands(folder, text):
    with pytest.raises(SampleError, match="'chair'"):
        decode_sample("chair", encode_sample(make_sample()) | {"json": text})
    (folder / "train-000000.index.json").write_bytes(text)
    with pytest.raises(ShardError, match="index"):
        read_index(folder, read_manifest(folder).shards[0])
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(ShardError, match="manifest"):
        read_manifest(folder)
