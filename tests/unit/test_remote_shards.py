"""Shards in a bucket and on a web server, both real and on loopback: read as local ones, through every fault."""

import hashlib
import http.server
import os
import random
import subprocess
import sys
import threading
import time
from functools import partial

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

# Sockets that the proxy or botocore leave to the garbage collector, on purpose or not, are no concern of these tests.
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("default::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Wait for hundredths of a second where a user would wait for seconds."""
    monkeypatch.setattr("lrm_pl.storage._MAX_DELAY_S", 0.02)


@pytest.fixture(params=["bucket", "web"])
def remote(request, shards):
    """The six ellipsoids at a URL, and the proxy before it."""
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
def test_what_is_read_at_a_url_is_what_is_read_locally(remote, shards, tmp_path, gigabytes):
    cache = CacheConfig(str(tmp_path / "cache"), gigabytes, ahead=2)
    require_equal(items(remote.address, cache), items(shards))
    tars = [path for path, _ in counted(remote) if path.endswith(".tar")]
    if gigabytes:
        deadline = time.monotonic() + 10
        while len(list((tmp_path / "cache").glob("*.tar"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        remote.seen.clear()
        require_equal(items(remote.address, cache), items(shards))
        assert not [path for path, _ in counted(remote) if path.endswith(".tar")], "copies were not used"
    else:
        assert tars
        assert not (tmp_path / "cache").exists()


def counted(proxy):
    return [(path, count + 1) for (method, path), count in proxy.seen.items() if method == "GET"]


@pytest.mark.parametrize("fault", ["503", "drop", "deaf", "cut", "slow"])
def test_a_fault_that_passes_changes_nothing(remote, shards, tmp_path, fault):
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


def test_copies_stay_within_their_limit_and_the_least_used_goes_first(remote, shards, tmp_path):
    first, second, third = read_manifest(shards).shards
    limit = first.bytes + max(second.bytes, third.bytes) + 1000
    cache = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), limit / 1e9))
    for shard in (first, second, first, third):
        assert cache.download(shard).read_bytes() == (shards / shard.name).read_bytes()
        assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= limit
    assert cache.find(second) is None, "the first was used since"
    assert cache.find(first) is not None
    small = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), first.bytes / 2e9))
    assert small.download(second) is None, "a shard larger than the cache is read by its members"


def test_a_copy_that_a_reader_removes_while_space_is_counted_costs_nothing(remote, shards, tmp_path):
    first, second, _ = read_manifest(shards).shards
    cache = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), 1.0))
    files, gone = cache._files, cache.download(first)

    def meanwhile():
        for path in files():
            gone.unlink(missing_ok=True)
            yield path

    cache._files = meanwhile
    assert cache.download(second).read_bytes() == (shards / second.name).read_bytes()
    assert not gone.exists()


def test_processes_share_one_copy_that_was_brought_once(remote, shards, tmp_path):
    remote.fault = lambda method, path, number: "slow" if path.endswith(".tar") else None
    processes = [bringing(remote, tmp_path / "cache") for _ in range(3)]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()
    tars = {path: count for path, count in counted(remote) if path.endswith(".tar")}
    assert len(tars) == 3
    assert set(tars.values()) == {1}
    for shard in read_manifest(shards).shards:
        copy = tmp_path / "cache" / f"{shard.sha256}.tar"
        assert copy.read_bytes() == (shards / shard.name).read_bytes()


def bringing(remote, folder):
    """Start a process that copies all shards."""
    program = (
        "import sys\nfrom lrm_pl.data.cache import *\nfrom lrm_pl.data.source import ShardSource\n"
        "config = CacheConfig(sys.argv[2], 1.0)\n"
        "for shard in ShardSource(sys.argv[1], config).manifest().shards:\n"
        "    ShardCache(sys.argv[1], config).download(shard)\n"
    )
    command = [sys.executable, "-c", program, remote.address, str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def test_a_transfer_that_was_killed_leaves_nothing_that_is_read_or_counted(remote, shards, tmp_path):
    remote.fault = lambda method, path, number: "slow" if path.endswith(".tar") else None
    process = bringing(remote, tmp_path / "cache")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.partial")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=10)
    remote.fault = lambda method, path, number: None
    first, second, _ = read_manifest(shards).shards
    limit = max(first.bytes, second.bytes) + 100  # no room for what was left behind
    cache = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), limit / 1e9))
    assert cache.find(first) is None
    assert cache.download(second).read_bytes() == (shards / second.name).read_bytes()
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_shard_that_is_not_the_manifests_is_never_copied(remote, shards, tmp_path):
    shard = read_manifest(shards).shards[0]
    content = bytearray((shards / shard.name).read_bytes())
    content[len(content) // 2] ^= 1
    put(remote, shard.name, bytes(content))
    cache = ShardCache(remote.address, CacheConfig(str(tmp_path / "cache"), 1.0))
    with pytest.raises(StoreError, match=f"expected sha256 {shard.sha256}, but found"):
        cache.download(shard)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock", ""}, (
        "neither a copy nor a part of one"
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
def test_a_vanished_shard_costs_its_own_samples_and_is_not_asked_for_each_time(remote, shards, what):
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
    assert count <= 7, (
        "the members of one sample, or an index, once: else six samples would be waited for in vain"
    )


def test_a_shard_that_is_back_after_a_while_is_read_again(remote, shards, monkeypatch):
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


def test_no_manifest_at_a_url_is_an_error_that_says_what_to_put_there(remote):
    with pytest.raises(ShardError, match=r"found no manifest\.json.*Copy the whole folder"):
        ShardSource(f"{remote.address}/nowhere").manifest()


def test_a_web_server_that_ignores_ranges_is_refused(shards):
    """Python's own, which sends whole files."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = ShardSource(f"http://127.0.0.1:{server.server_port}", CacheConfig(None, 0.0, attempts=1))
        shard = source.manifest().shards[0]
        with pytest.raises(StoreError, match=r"Use a server that supports range requests"):
            source.read(shard, [(512, 100)])
        server.shutdown()


def test_numbers_that_mean_nothing_are_refused():
    for wrong in ({"gigabytes": -1.0}, {"attempts": 0}, {"ahead": -1}):
        with pytest.raises(InputError, match="of 0 or more"):
            CacheConfig(**wrong)


def test_a_bad_sample_is_told_with_the_item_that_took_its_place(shards, tmp_path):
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil_first_poses(tmp_path / "train-000000.tar")
    found = items(tmp_path)
    assert sum(bool(met) for batch in found for met in batch.faults) == 3, "once an epoch"
    (message,) = {message for batch in found for met in batch.faults for message in met}
    assert str(tmp_path / "train-000000.tar") in message
    assert "'train-ellipsoid-000'" in message


@pytest.mark.parametrize("remote", [pytest.param("bucket", marks=pytest.mark.soak), "web"], indirect=True)
def test_a_store_that_is_down_ends_the_run_instead_of_being_asked_for_each_shard(remote, tmp_path):
    write_synthetic_shards(tmp_path / "many", train=8, val=1, views=8, resolution=32, shard_size=1)
    for path in (tmp_path / "many").iterdir():
        put(remote, path.name, path.read_bytes())
    remote.fault = lambda method, path, number: "503" if path.endswith(".tar") else None
    with pytest.raises(StoreDownError, match=r"4 files in a row could not be read\. .*Start the run again"):
        items(remote.address, CacheConfig(None, 0.0, attempts=1))


@pytest.mark.parametrize("where", [b"", b"WEBPVP8L"], ids=["everything", "images"])
def test_a_copy_that_was_damaged_on_this_machine_is_removed_and_read_anew(
    remote, shards, tmp_path, caplog, where
):
    cache = CacheConfig(str(tmp_path / "cache"), 1.0)
    shard = read_manifest(shards).split("train")[0]
    copy = ShardCache(remote.address, cache).download(shard)
    # As after a power failure: all of its size, and nothing in it.
    copy.write_bytes(copy.read_bytes().replace(where, bytes(len(where))) if where else bytes(shard.bytes))
    require_equal(items(remote.address, cache), items(shards))
    assert caplog.text.count("removed a damaged copy") == 1


@pytest.mark.parametrize(
    "url", ["https://nowhere.invalid/a.glb", "http://127.0.0.1:9/a.glb", "s3://bucket/a.glb"]
)
def test_a_server_that_is_not_reached_is_the_network_s_fault_and_is_asked_again(url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    asked = []

    def ask():
        asked.append(url)
        fs, inner = open_store(url)
        with store_errors(url):
            fs.info(inner)

    with pytest.raises(
        StoreError, match=r"expected a connection to its server, but found no network or an unknown host: "
    ) as error:
        retry(ask, 2, 0.01)
    assert len(asked) == 2
    assert "AWS" not in str(error.value)


def test_the_hub_that_is_not_reached_is_one_error_and_no_traceback(root):
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
        "StoreError: hf://datasets/nobody/none/manifest.json: expected a connection to its server"
        in done.stderr
    )
