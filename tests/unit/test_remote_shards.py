"""Shards in an object store and on a web server, with real local servers and injected faults."""

import hashlib
import http.server
import os
import random
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import fsspec
import pytest
import torch

from lrm_pl.data import source as source_module
from lrm_pl.data.cache import CacheConfig, ShardCache
from lrm_pl.data.manifest import ShardError, read_manifest
from lrm_pl.data.mixture import DataSet, Mixture
from lrm_pl.data.source import ShardSource
from lrm_pl.data.stream import BatchPartition, TrainingStream
from lrm_pl.data.synthetic import write_synthetic_shards
from lrm_pl.data.transforms import Augmentation, CropConfig
from lrm_pl.errors import InputError
from lrm_pl.storage import StoreDownError, StoreError, open_store, retry, store_errors
from tests.builders import spoil_first_poses

pytest_plugins = ["tests.servers.s3_store", "tests.servers.web_server"]

# The proxy and botocore leave some sockets open until garbage collection.
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


#: For tests of the cache and of retries, which do not depend on the type of the store.
each_store_in_soak = pytest.mark.parametrize(
    "remote", [pytest.param("bucket", marks=pytest.mark.soak), "web"], indirect=True
)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    """Shorten the delays between attempts."""
    monkeypatch.setattr("lrm_pl.storage._MAX_DELAY_S", 0.02)


@pytest.fixture(params=["bucket", "web"])
def remote(request, shards):
    """A proxy before a server with six ellipsoids."""
    if request.param == "bucket":
        proxy = request.getfixturevalue("s3")
        fsspec.filesystem("s3").put(f"{shards}/", "bucket/shards/", recursive=True)
        proxy.address = "s3://bucket/shards"
    else:
        proxy = request.getfixturevalue("web_server")
        for path in shards.iterdir():
            (proxy.folder / path.name).write_bytes(path.read_bytes())
        proxy.address = proxy.url
    proxy.seen.clear()
    return proxy


def items(folder, cache=CacheConfig(), steps=12):  # noqa: B008 - frozen
    """The batches of three epochs of four objects, one at a time."""
    augmentation, mixture = Augmentation(CropConfig(16, 32, 16)), Mixture([DataSet(str(folder))], cache)
    stream = TrainingStream(mixture, BatchPartition(1), 1, 2, 2, None, augmentation, 0, 2, steps)
    return [batch.to("cpu") for batch in stream]


def require_equal(found, expected):
    assert [batch.ids for batch in found] == [batch.ids for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.target.images, other.target.images)
        assert torch.equal(one.input.c2w, other.input.c2w)


@pytest.mark.parametrize("gigabytes", [0.0, 1.0])
def test_remote_samples_equal_local_samples(remote, shards, tmp_path, gigabytes):
    cache = CacheConfig(str(tmp_path / "cache"), gigabytes, ahead=2)
    require_equal(items(remote.address, cache), items(shards))
    tars = [path for path, _ in counted(remote) if path.endswith(".tar")]
    if gigabytes:
        deadline = time.monotonic() + 10
        while len(list((tmp_path / "cache").glob("*.tar"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        remote.seen.clear()
        require_equal(items(remote.address, cache), items(shards))
        assert not [path for path, _ in counted(remote) if path.endswith(".tar")], (
            "cached copies must be used"
        )
    else:
        assert tars
        assert not (tmp_path / "cache").exists()


def counted(proxy):
    return [(path, count + 1) for (method, path), count in proxy.seen.items() if method == "GET"]


@pytest.mark.parametrize(
    ("remote", "fault"),
    [
        pytest.param(store, fault, marks=() if store == "web" or fault == "503" else pytest.mark.soak)
        for store in ("web", "bucket")
        for fault in ("503", "drop", "deaf", "cut", "slow")
    ],
    indirect=["remote"],
)
def test_transient_faults_do_not_change_samples(remote, shards, tmp_path, fault):
    chance = random.Random(0)
    remote.fault = lambda method, path, number: fault if chance.random() < 0.3 else None
    for gigabytes in (0.0, 1.0):  # members alone, then copies of shards
        cache = CacheConfig(str(tmp_path / "cache"), gigabytes, attempts=12, ahead=2)
        require_equal(items(remote.address, cache), items(shards))
    assert len(remote.broken) > 5
    sums = {shard.sha256 for shard in read_manifest(shards).shards}
    for copy in (tmp_path / "cache").glob("*.tar"):
        assert hashlib.sha256(copy.read_bytes()).hexdigest() == copy.stem
        assert copy.stem in sums


@each_store_in_soak
def test_the_cache_evicts_the_least_recently_used_copy(remote, shards, tmp_path):
    first, second, third = read_manifest(shards).shards
    limit = first.bytes + max(second.bytes, third.bytes) + 1000
    cache = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), limit / 1e9))
    for shard in (first, second, first, third):
        assert cache.download(shard).read_bytes() == (shards / shard.name).read_bytes()
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= limit
    assert cache.find(second) is None
    assert cache.find(first) is not None
    small = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), first.bytes / 2e9))
    assert small.download(second) is None


@each_store_in_soak
def test_a_copy_that_is_removed_while_the_cache_is_listed_is_ignored(remote, shards, tmp_path, monkeypatch):
    first, second, _ = read_manifest(shards).shards
    cache = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), 1.0))
    iterdir, gone = Path.iterdir, cache.download(first)

    def iterdir_during_removal(folder):
        for path in list(iterdir(folder)):
            gone.unlink(missing_ok=True)
            yield path

    monkeypatch.setattr(Path, "iterdir", iterdir_during_removal)
    assert cache.download(second).read_bytes() == (shards / second.name).read_bytes()
    assert not gone.exists()


@each_store_in_soak
def test_processes_download_a_shard_once(remote, shards, tmp_path):
    remote.fault = lambda method, path, number: "slow" if path.endswith(".tar") else None
    processes = [download_all(remote, tmp_path / "cache") for _ in range(3)]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    tars = {path: count for path, count in counted(remote) if path.endswith(".tar")}
    assert len(tars) == 3
    assert set(tars.values()) == {1}
    for shard in read_manifest(shards).shards:
        copy = tmp_path / "cache" / f"{shard.sha256}.tar"
        assert copy.read_bytes() == (shards / shard.name).read_bytes()


def download_all(remote, folder):
    """Start a process that copies all shards."""
    program = (
        "import sys\nfrom lrm_pl.data.cache import *\nfrom lrm_pl.data.source import ShardSource\n"
        "config = CacheConfig(sys.argv[2], 1.0)\n"
        "for shard in ShardSource(sys.argv[1], config).manifest().shards:\n"
        "    ShardCache(sys.argv[1], config).download(shard)\n"
    )
    command = [sys.executable, "-c", program, remote.address, str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@each_store_in_soak
def test_partial_downloads_of_killed_processes_are_removed(remote, shards, tmp_path):
    remote.fault = lambda method, path, number: "slow" if path.endswith(".tar") else None
    process = download_all(remote, tmp_path / "cache")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.partial")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=10)
    remote.fault = lambda method, path, number: None
    first, second, _ = read_manifest(shards).shards
    limit = max(first.bytes, second.bytes) + 100  # smaller than the cache with the partial download
    cache = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), limit / 1e9))
    assert cache.find(first) is None
    assert cache.download(second).read_bytes() == (shards / second.name).read_bytes()
    assert not list((tmp_path / "cache").glob("*.partial"))


@each_store_in_soak
def test_a_download_with_a_different_hash_is_rejected(remote, shards, tmp_path):
    shard = read_manifest(shards).shards[0]
    content = bytearray((shards / shard.name).read_bytes())
    content[len(content) // 2] ^= 1
    put(remote, shard.name, bytes(content))
    cache = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), 1.0))
    with pytest.raises(StoreError, match=f"expected the SHA-256 hash {shard.sha256}, but found"):
        cache.download(shard)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock", ""}, (
        "the cache must not contain a copy"
    )
    assert cache.find(shard) is None


def put(remote, name, content):
    """Replace a file, or remove it."""
    if remote.address.startswith("s3"):
        fs = fsspec.filesystem("s3")
        fs.rm(f"bucket/shards/{name}")
        if content is not None:
            fs.pipe(f"bucket/shards/{name}", content)
    elif content is None:
        (remote.folder / name).unlink()
    else:
        (remote.folder / name).write_bytes(content)


@pytest.mark.parametrize("what", ["tar", "index"])
def test_a_missing_shard_loses_only_its_samples_and_is_requested_once(remote, shards, what):
    lost = read_manifest(shards).split("train")[0]
    put(remote, lost.name if what == "tar" else lost.index_name, None)
    found = items(remote.address, CacheConfig(None, 0.0))
    assert len(found) == 12
    assert {batch.ids[0] for batch in found} == {"train-ellipsoid-002", "train-ellipsoid-003"}
    name = lost.name if what == "tar" else lost.index_name
    faults = [message for batch in found for met in batch.faults for message in met]
    assert len(faults) >= 6, "two of four objects in three epochs"
    assert all(name in message for message in faults)
    assert what == "index" or any("'train-ellipsoid-000'" in message for message in faults)
    (count,) = {count for path, count in counted(remote) if path.endswith(name)} or {0}
    assert count <= 7, "the members of one sample or one index must be requested once"


@each_store_in_soak
def test_an_unreadable_shard_is_retried_after_a_delay(remote, shards, monkeypatch):
    monkeypatch.setattr(source_module, "_RETRY_AFTER_S", 0.3)
    shard = read_manifest(shards).shards[0]
    source = ShardSource(remote.address, CacheConfig(None, 0.0, attempts=1))
    remote.fault = lambda method, path, number: "503" if path.endswith(".tar") else None
    with pytest.raises(StoreError):
        source.read(shard, [(0, 512)])
    remote.fault = lambda method, path, number: None
    with pytest.raises(StoreError):
        source.read(shard, [(0, 512)])
    time.sleep(0.4)
    assert source.read(shard, [(0, 512)]) == [(shards / shard.name).read_bytes()[:512]]


def test_a_missing_remote_manifest_raises_an_error_with_the_remedy(remote):
    with pytest.raises(ShardError, match=r"found no manifest\.json.*Copy the whole folder"):
        ShardSource(f"{remote.address}/nowhere").manifest()


def test_a_web_server_without_range_requests_raises_an_error(shards):
    """The server of the standard library sends complete files."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = ShardSource(f"http://127.0.0.1:{server.server_port}", CacheConfig(None, 0.0, attempts=1))
        shard = source.manifest().shards[0]
        with pytest.raises(StoreError, match=r"Use a server that supports range requests"):
            source.read(shard, [(512, 100)])
        server.shutdown()


def test_invalid_cache_settings_raise_an_error():
    for wrong in ({"gigabytes": -1.0}, {"attempts": 0}, {"ahead": -1}):
        with pytest.raises(InputError, match="to be 0 or more"):
            CacheConfig(**wrong)


def test_replacement_items_contain_the_error_of_the_bad_sample(shards, tmp_path):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil_first_poses(tmp_path / "train-000000.tar")
    found = items(tmp_path)
    assert sum(bool(met) for batch in found for met in batch.faults) == 3, "once an epoch"
    (message,) = {message for batch in found for met in batch.faults for message in met}
    assert str(tmp_path / "train-000000.tar") in message
    assert "'train-ellipsoid-000'" in message


@each_store_in_soak
def test_an_unavailable_store_stops_the_run(remote, tmp_path):
    write_synthetic_shards(tmp_path / "many", train=8, val=1, views=8, resolution=32, shard_size=1)
    for path in (tmp_path / "many").iterdir():
        put(remote, path.name, path.read_bytes())
    remote.fault = lambda method, path, number: "503" if path.endswith(".tar") else None
    with pytest.raises(
        StoreDownError, match=r"4 consecutive files could not be read\. .*Start the run again"
    ):
        items(remote.address, CacheConfig(None, 0.0, attempts=1))


@each_store_in_soak
@pytest.mark.parametrize("where", [b"", b"WEBPVP8L"], ids=["everything", "images"])
def test_a_damaged_copy_is_removed_and_downloaded_again(remote, shards, tmp_path, caplog, where):
    cache = CacheConfig(str(tmp_path / "cache"), 1.0)
    shard = read_manifest(shards).split("train")[0]
    copy = ShardCache(remote.address, cache).download(shard)
    # A file of the full size without content, as after a power failure.
    copy.write_bytes(copy.read_bytes().replace(where, bytes(len(where))) if where else bytes(shard.bytes))
    require_equal(items(remote.address, cache), items(shards))
    assert caplog.text.count("removed a damaged copy") == 1


@pytest.mark.parametrize(
    "url", ["https://nowhere.invalid/a.glb", "http://127.0.0.1:9/a.glb", "s3://bucket/a.glb"]
)
def test_an_unreachable_server_is_retried_and_reported_as_a_network_error(url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    requests = []

    def request():
        requests.append(url)
        fs, inner = open_store(url)
        with store_errors(url):
            fs.info(inner)

    with pytest.raises(
        StoreError, match=r"expected a connection to the server, but found no network or an unknown host: "
    ) as error:
        retry(request, 2, 0.01)
    assert len(requests) == 2
    assert "AWS" not in str(error.value)


def test_an_unreachable_hub_raises_a_single_store_error(root):
    program = (
        "from lrm_pl.data.source import ShardSource; ShardSource('hf://datasets/nobody/none').manifest()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (
        "StoreError: hf://datasets/nobody/none/manifest.json: expected a connection to the server"
        in done.stderr
    )
