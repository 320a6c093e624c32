"""Statistics and HTML page of `data_tools inspect`."""

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
    """Folder with one object, which has two views with known statistics. Its name and license contain HTML tags."""
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


def test_statistics_match_known_values(folder):
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


def test_the_page_is_self_contained_and_escapes_records(folder, capsys):
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


def test_a_histogram_counts_all_values_even_if_they_are_equal():
    heights = re.compile(r'height="([\d.]+)" fill')
    for values in (np.array([1.0, 1.0, 1.0]), np.linspace(0, 1, 24)):
        bars = [float(height) for height in heights.findall(histogram(values))]
        assert len(bars) == 24
        assert max(bars) == 120
    assert sum(bars) == 24 * 120, "one value in each of 24 bins"


def test_the_number_of_points_in_a_plot_is_limited():
    place = np.random.default_rng(0).normal(size=(100_000, 3))
    assert plot_cameras(place).count("<circle") <= 2 * 2000 + 2


def test_a_damaged_folder_raises_an_error_that_suggests_validate(shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    spoil_first_poses(broken / "train-000000.tar")
    with pytest.raises(
        ShardError, match=r"train-000000\.tar: sample .*Run `python -m data_tools validate --shards"
    ):
        inspect(broken)


def test_outcomes_are_counted_without_a_filter_table(folder, capsys):
    assert main(["inspect", "--shards", str(folder)]) == 0
    assert re.search(r"outcomes\s+2 values: kept 1, failed 1\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "filter.parquet",
            b"PAR1",
            "expected the outcome of each asset, but found .*. Delete .*filter.parquet and",
        ),
        (
            "failures.jsonl",
            b"\n{broken\n",
            "line 2: expected a record with id, file and reason, but found .*Delete this line",
        ),
        ("failures.jsonl", b'{"id": "b"}\n', "line 1: "),
        ("failures.jsonl", b"\xff\n", "line 1: "),
    ],
)
def test_a_damaged_table_or_list_raises_an_error_with_a_remedy(folder, name, content, message, capsys):
    (folder / name).write_bytes(content)
    assert main(["inspect", "--shards", str(folder)]) == 1
    assert re.match(rf"error: \S*{name}[:,].*{message}", capsys.readouterr().err.splitlines()[-1])
