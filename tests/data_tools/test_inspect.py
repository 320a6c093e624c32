"""What `data_tools inspect` says of a folder: numbers that can be known beforehand, and a page that shows them."""

import html.parser
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest

from data_tools.__main__ import main
from data_tools.quality.report import collect_statistics, histogram, inspect, plot_cameras
from lrm_pl.data.manifest import Manifest, ShardError, read_manifest, write_manifest
from lrm_pl.data.schema import Sample, SampleInfo, encode_image, encode_sample
from lrm_pl.data.tar import write_shard
from tests.builders import spoil_first_poses


@pytest.fixture
def folder(tmp_path):
    """One object of two views whose numbers are known; its name and license want to be markup."""
    rgba = np.zeros((2, 20, 20, 4), dtype=np.uint8)
    rgba[0, :5] = 255  # a quarter
    rgba[1] = 255
    c2w = np.tile(np.eye(4, dtype=np.float32), (2, 1, 1))
    c2w[0, :3, 3] = (3, 0, 0)
    c2w[1, :3, 3] = (0, 1, 1)
    fxfycxcy = np.tile(np.float32([0.5, 0.5, 0.5, 0.5]), (2, 1))
    info = SampleInfo("a", "<b>A</b>", "<script>alert(1)</script>", "Ann & Bob", "library", 7, "blender", 2)
    sample = Sample(info, c2w, fxfycxcy, tuple(encode_image(image) for image in rgba))
    shard = write_shard(tmp_path, "train-000000.tar", "train", [("a", encode_sample(sample))])
    write_manifest(tmp_path, Manifest((shard,), 2, 1, {"preset": "frame"}))
    record = {"id": "b", "file": "b.glb", "reason": "is empty: <i>no faces</i>\nand more"}
    (tmp_path / "failures.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def test_numbers_are_those_that_are_known(folder):
    found = collect_statistics(folder, read_manifest(folder))
    expected = {
        ("camera distance", "scene units"): [3, 2**0.5],
        ("elevation", "degrees"): [0, 45],
        ("field of view", "degrees"): [90, 90],
        ("image coverage", "%"): [25, 100],
        ("longer side", "pixels"): [20, 20],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found.quantities[name], values, rtol=1e-6, atol=1e-5)
    assert {unit for _, unit in found.quantities.keys() - expected.keys()} == {"kB"}


def test_the_page_is_one_file_in_which_records_are_text(folder, capsys):
    assert main(["inspect", "--shards", str(folder)]) == 0
    text = (folder / "inspect.html").read_text()
    seen = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, dict(attributes)))

    Reader().feed(text)
    tags = Counter(tag for tag, _ in seen)
    assert tags["svg"] == 7
    assert not tags["script"]
    assert not tags["i"]
    assert tags["img"] == 1
    sources = [value for _, attributes in seen for key, value in attributes.items() if key in ("src", "href")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for word in (
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "Ann &amp; Bob",
        "is empty: &lt;i&gt;no faces&lt;/i&gt;",
    ):
        assert word in text
    out = capsys.readouterr().out
    assert "objects        1 (1 train, 0 held out), 2 views each" in out
    assert re.search(r"image coverage\s+25 / 62.5 / 100 %", out)
    assert f"page           {folder / 'inspect.html'}" in out


def test_a_histogram_counts_every_value_also_where_all_are_equal():
    heights = re.compile(r'height="([\d.]+)" fill')
    for values in (np.array([1.0, 1.0, 1.0]), np.linspace(0, 1, 24)):
        bars = [float(height) for height in heights.findall(histogram(values))]
        assert len(bars) == 24
        assert max(bars) == 120
    assert sum(bars) == 24 * 120, "one value in each of 24 bars"


def test_a_plot_of_many_cameras_stays_small():
    place = np.random.default_rng(0).normal(size=(100_000, 3))
    assert plot_cameras(place).count("<circle") <= 2 * 2000 + 2


def test_a_damaged_folder_points_to_validate(shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    spoil_first_poses(broken / "train-000000.tar")
    with pytest.raises(
        ShardError, match=r"train-000000\.tar: sample .*Run `python -m data_tools validate --shards"
    ):
        inspect(broken)


def test_a_folder_without_a_table_says_what_became_of_its_objects(folder, capsys):
    assert main(["inspect", "--shards", str(folder)]) == 0
    assert re.search(r"outcomes\s+2 values: kept 1, failed 1\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("filter.parquet", b"PAR1", "expected the outcome of each asset, but found .*. Delete it and"),
        (
            "failures.jsonl",
            b"\n{broken\n",
            "line 2: expected a record with id, file and reason, but found .*Delete the line",
        ),
        ("failures.jsonl", b'{"id": "b"}\n', "line 1: "),
        ("failures.jsonl", b"\xff\n", "line 1: "),
    ],
)
def test_a_damaged_table_or_list_is_one_message(folder, name, content, message, capsys):
    (folder / name).write_bytes(content)
    assert main(["inspect", "--shards", str(folder)]) == 1
    assert re.match(rf"error: \S*{name}[:,].*{message}", capsys.readouterr().err.splitlines()[-1])
