"""Download of Objaverse from a local server with the layout of the data set."""

import gzip
import hashlib
import json
import random
import struct

import pytest

from data_tools.__main__ import main
from data_tools.assets.objaverse import LICENSES, fetch_objaverse, make_asset
from data_tools.assets.scan import find_assets
from lrm_pl.errors import InputError

pytest_plugins = ["tests.servers.web_server"]

# The proxy leaves some sockets to the garbage collector on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",
    "default::DeprecationWarning",
)

UIDS = ["0a" * 16, "1b" * 16, "2c" * 16, "3d" * 16]
CHAIR, CHAIR_2, TABLE, FISH = UIDS


def glb(uid):
    body = random.Random(uid).randbytes(900)
    return b"glTF" + struct.pack("<II", 2, 912) + body


def record(uid, **changes):
    return {
        "uri": f"https://api.sketchfab.com/v3/models/{uid}",
        "uid": uid,
        "name": f"Name of {uid[:2]}",
        "user": {"username": "ann_3d", "displayName": "Ann"},
        "license": "by",
        "viewerUrl": f"https://sketchfab.com/3d-models/{uid}",
        "tags": [{"name": "oak", "slug": "oak"}, {"name": "seat"}],
        "categories": [{"name": "furniture-home"}],
        "archives": {"glb": {"size": 912}, "usdz": {"size": 7}},
    } | changes


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    """Shorten retry delays to hundredths of a second."""
    monkeypatch.setattr("lrm_pl.storage._MAX_DELAY_S", 0.02)


@pytest.fixture
def objaverse(web_server):
    """Two chairs, a table and a fish in two folders, as in allenai/objaverse."""

    def write(name, table):
        path = web_server.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(json.dumps(table).encode()))

    paths = {uid: f"glbs/000-00{n // 2}/{uid}.glb" for n, uid in enumerate(UIDS)}
    for uid, path in paths.items():
        (web_server.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (web_server.folder / path).write_bytes(glb(uid))
    write("object-paths.json.gz", paths)
    write("lvis-annotations.json.gz", {"chair": [CHAIR_2, CHAIR], "table": [TABLE], "armchair": [CHAIR]})
    write("metadata/000-000.json.gz", {uid: record(uid) for uid in (CHAIR, CHAIR_2)})
    write(
        "metadata/000-001.json.gz",
        {TABLE: record(TABLE, license="by-nc-sa"), FISH: record(FISH, license="cc0")},
    )
    web_server.write, web_server.paths = write, paths
    return web_server


def fetch(server, out, uids=(), categories=(), limit=None, urls_only=False):
    fetch_objaverse(out, uids, categories, limit, urls_only, server.url + "/")
    return find_assets(out)


def left_out(out):
    lines = (out / "left_out.jsonl").read_text().splitlines()
    return {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}


def test_objects_of_categories_have_names_licenses_tags_and_hashes(objaverse, tmp_path, capsys):
    found = fetch(objaverse, tmp_path, categories=["chair", "table"])
    assert [asset.id for asset in found] == [CHAIR, CHAIR_2, TABLE]
    assert [asset.license for asset in found] == ["CC-BY-4.0", "CC-BY-4.0", "CC-BY-NC-SA-4.0"]
    chair = found[0]
    assert (chair.name, chair.creator, chair.split) == ("Name of 0a", "Ann", "")
    assert chair.source == f"https://sketchfab.com/3d-models/{CHAIR}"
    assert chair.tags == ("chair", "furniture-home", "oak", "seat")
    assert chair.file == f"glbs/000-000/{CHAIR}.glb"
    assert chair.sha256 == hashlib.sha256((tmp_path / chair.file).read_bytes()).hexdigest()
    assert (tmp_path / chair.file).read_bytes() == glb(CHAIR)
    assert f"{CHAIR} | Name of 0a | Ann | CC-BY-4.0 | https://" in (tmp_path / "ATTRIBUTION.txt").read_text()
    assert capsys.readouterr().out.endswith(
        f"next  make render-shards ASSETS={tmp_path} OUT=data/{tmp_path.name}\n"
    )


def test_the_limit_selects_the_first_uids_and_urls_only_downloads_no_mesh(objaverse, tmp_path):
    (first,) = fetch(objaverse, tmp_path, categories=["chair"], limit=1, urls_only=True)
    assert first.file == f"{objaverse.url}/glbs/000-000/{CHAIR}.glb"
    assert (first.is_remote, first.sha256) == (True, "")
    assert not (tmp_path / "glbs").exists()
    assert not any(path.endswith(".glb") for _, path in objaverse.seen)


def test_only_required_tables_are_downloaded_and_only_once(objaverse, tmp_path):
    fetch(objaverse, tmp_path, uids=[FISH])
    assert {path for _, path in objaverse.seen} == {
        "/object-paths.json.gz",
        "/metadata/000-001.json.gz",
        f"/glbs/000-001/{FISH}.glb",
    }
    objaverse.seen.clear()
    fetch(objaverse, tmp_path, uids=[FISH])
    assert objaverse.seen == {}


def test_failed_downloads_are_left_out_and_retried_by_the_next_run(objaverse, tmp_path, capsys):
    (objaverse.folder / objaverse.paths[CHAIR]).write_bytes(b"<html>wait")
    (objaverse.folder / objaverse.paths[TABLE]).write_bytes(glb(TABLE)[:-1])
    objaverse.fault = lambda method, path, number: "503" if path.endswith(f"{CHAIR_2}.glb") else None
    assert [asset.id for asset in fetch(objaverse, tmp_path, uids=UIDS)] == [FISH]
    reasons = left_out(tmp_path)
    assert "expected glb, but found a file that starts with '<html>wait'" in reasons[CHAIR]
    assert "503" in reasons[CHAIR_2]
    assert "expected 912 bytes according to the header, but found 911" in reasons[TABLE]
    said = capsys.readouterr().out
    assert "Left out 3 of 4" in said
    assert "3  not downloaded\nRun the same command again to retry." in said
    objaverse.fault = lambda method, path, number: None
    (objaverse.folder / objaverse.paths[CHAIR]).write_bytes(glb(CHAIR))
    assert [asset.id for asset in fetch(objaverse, tmp_path, uids=UIDS)] == [CHAIR, CHAIR_2, FISH]
    assert list(left_out(tmp_path)) == [TABLE]


def test_a_run_without_usable_objects_fails(objaverse, tmp_path):
    (objaverse.folder / objaverse.paths[FISH]).unlink()
    with pytest.raises(InputError, match=r"expected at least one usable asset, but found none \(1 left out"):
        fetch(objaverse, tmp_path, uids=[FISH])
    assert "expected a file, but found none" in left_out(tmp_path)[FISH]


def test_the_error_for_an_unknown_name_suggests_similar_names(objaverse, tmp_path):
    with pytest.raises(
        InputError,
        match=r"expected a category of Objaverse, but found 'chairs'. Did you mean chair or armchair\?",
    ):
        fetch(objaverse, tmp_path, categories=["table", "chairs"])
    with pytest.raises(InputError, match=r"found 'zzz'\. An example is armchair"):
        fetch(objaverse, tmp_path, categories=["zzz", "yyy"])
    with pytest.raises(
        InputError, match=rf"expected a uid of Objaverse, but found '{FISH[:-1]}'. Did you mean {FISH}"
    ):
        fetch(objaverse, tmp_path, uids=[FISH[:-1]])


def test_a_selection_of_objects_is_required(objaverse, tmp_path, capsys):
    assert main(["fetch", "objaverse", "--out", str(tmp_path), "--base", objaverse.url]) == 1
    assert "expected uids or categories (the complete data set is 8.9 TB)" in capsys.readouterr().err
    uids = tmp_path / "uids.txt"
    uids.write_text(f"{FISH}\n{TABLE}\n")
    out = ["--out", str(tmp_path / "out"), "--base", objaverse.url]
    assert main(["fetch", "objaverse", "--uids-file", str(uids), *out]) == 0
    assert [asset.id for asset in find_assets(tmp_path / "out")] == [TABLE, FISH]
    with pytest.raises(SystemExit):
        main(["fetch", "objaverse", "--uids-file", str(tmp_path / "absent.txt"), *out])
    assert "--uids-file: expected a text file with one uid per line, but found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", ["../../etc/x.glb", "/etc/x.glb", "glbs/000-000/other.glb", "glbs/000-001/../x.glb", 7]
)
def test_an_object_with_an_unexpected_path_is_left_out(objaverse, tmp_path, path):
    objaverse.write("object-paths.json.gz", objaverse.paths | {CHAIR: path})
    assert [asset.id for asset in fetch(objaverse, tmp_path / "out", uids=[CHAIR, FISH])] == [FISH]
    assert left_out(tmp_path / "out")[CHAIR].startswith("unexpected path: expected glbs/000-000/")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "web"] == ["out"]


def test_a_damaged_table_is_rejected(objaverse, tmp_path):
    for content, message in (
        (gzip.compress(b"{"), "expected gzipped JSON, but found Expecting"),
        (gzip.compress(b"[]"), "expected a non-empty JSON object"),
        (gzip.compress(b"{}" * 900)[:-9], "expected gzipped JSON, but found Compressed file ended"),
    ):
        (objaverse.folder / "object-paths.json.gz").write_bytes(content)
        (tmp_path / "index" / "object-paths.json.gz").unlink(missing_ok=True)
        with pytest.raises(InputError, match=message):
            fetch(objaverse, tmp_path, uids=[FISH])


def test_licenses_are_spdx_ids_and_missing_metadata_is_unknown():
    assert LICENSES["by-nc-nd"] == "CC-BY-NC-ND-4.0"
    for strange in (
        None,
        [],
        {"user": 3, "tags": {"name": "x"}, "license": ["by"], "name": "  ", "categories": [4]},
    ):
        asset = make_asset("u", "u.glb", strange)
        assert (asset.name, asset.creator, asset.license, asset.tags) == ("u", "unknown", "unknown", ())
    assert make_asset("u", "u.glb", {"license": "editorial"}).license == "editorial"
