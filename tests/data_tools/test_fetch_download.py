"""Downloads from a local web server behind a proxy with failing requests."""

import contextlib
import hashlib
import http.server
import json
import random
import struct
import threading

import pytest

from data_tools.assets import download as module
from data_tools.assets.download import Download, download, download_all
from lrm_pl.errors import InputError
from lrm_pl.storage import MissingError

pytest_plugins = ["tests.servers.web_server"]

# The proxy leaves some sockets to the garbage collector on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::ResourceWarning",
    "default::DeprecationWarning",
)


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    """Shorten retry delays to hundredths of a second, and chunks to kilobytes."""
    monkeypatch.setattr("lrm_pl.storage._MAX_DELAY_S", 0.02)
    monkeypatch.setattr(module, "CHUNK", 1000)


def glb(size=5500, seed=0):
    body = random.Random(seed).randbytes(size - 12)
    return b"glTF" + struct.pack("<II", 2, size) + body


def sha(content):
    return hashlib.sha256(content).hexdigest()


def requests(proxy, method="GET"):
    return sum(count + 1 for (verb, _), count in proxy.seen.items() if verb == method)


def test_a_complete_file_is_not_downloaded_again(web_server, tmp_path):
    (web_server.folder / "a.glb").write_bytes(glb())
    path = tmp_path / "x" / "a.glb"
    assert download(f"{web_server.url}/a.glb", path, sha(glb())) == sha(glb())
    assert path.read_bytes() == glb()
    assert [entry.name for entry in path.parent.iterdir()] == ["a.glb"]
    web_server.seen.clear()
    assert download(f"{web_server.url}/a.glb", path) == sha(glb())
    assert web_server.seen == {}


@pytest.mark.parametrize("fault", ["503", "500", "drop", "deaf", "cut", "slow"])
def test_transient_server_errors_are_retried(web_server, tmp_path, fault):
    (web_server.folder / "a.glb").write_bytes(glb())
    chance = random.Random(1)
    web_server.fault = lambda method, path, number: fault if chance.random() < 0.4 else None
    assert download(f"{web_server.url}/a.glb", tmp_path / "a.glb") == sha(glb())
    assert web_server.broken


def test_an_interrupted_download_resumes_with_the_missing_part(web_server, tmp_path):
    (web_server.folder / "a.glb").write_bytes(glb())
    web_server.fault = lambda method, path, number: "cut" if method == "GET" and number >= 3 else None
    with pytest.raises(InputError, match="the request failed with"):
        download(f"{web_server.url}/a.glb", tmp_path / "a.glb")
    assert not (tmp_path / "a.glb").exists()
    assert (tmp_path / "a.glb.partial").read_bytes() == glb()[:3000]
    web_server.fault = lambda method, path, number: None
    web_server.seen.clear()
    assert download(f"{web_server.url}/a.glb", tmp_path / "a.glb") == sha(glb())
    assert requests(web_server) == 3  # 1000, 1000 and 500 bytes


def test_the_contents_of_a_partial_file_are_not_downloaded_again(web_server, tmp_path):
    (web_server.folder / "a.obj").write_bytes(b"# theirs\n" + b"v 0 0 0\n" * 10)
    (tmp_path / "a.obj.partial").write_bytes(b"# mine..\n")
    download(f"{web_server.url}/a.obj", tmp_path / "a.obj")
    assert (tmp_path / "a.obj").read_bytes() == b"# mine..\n" + b"v 0 0 0\n" * 10


def test_a_partial_file_of_another_version_is_downloaded_again(web_server, tmp_path):
    (web_server.folder / "a.glb").write_bytes(glb())
    for other in (glb(seed=7)[:2500], glb(9000)[:7000]):
        (tmp_path / "a.glb.partial").write_bytes(other)
        assert download(f"{web_server.url}/a.glb", tmp_path / "a.glb", sha(glb())) == sha(glb())
        (tmp_path / "a.glb").unlink()


def test_a_file_with_an_outdated_hash_is_replaced(web_server, tmp_path):
    (web_server.folder / "a.glb").write_bytes(glb(seed=2))
    (tmp_path / "a.glb").write_bytes(glb())
    new = sha(glb(seed=2))
    assert download(f"{web_server.url}/a.glb", tmp_path / "a.glb", new) == new


@pytest.mark.parametrize(
    ("name", "content", "begins"),
    [
        ("a.glb", b"<!DOCTYPE html><title>Too many requests</title>", "'<!DOCTYPE html><title>Too many"),
        ("a.obj", b"<?xml version='1.0'?><Error/>", r"<\?xml version="),
        ("a.obj", b'{"errcode": 3000}', "'{\"errcode\": 3000}'"),
        ("a.gltf", b'{"error": "gone"}', "gone.* and has no asset field"),
        ("a.ply", b"solid cube", "'solid cube'"),
        ("a.fbx", b"\x89PNG", "PNG"),
        ("a.zip", b"<html>", "'<html>'"),
        ("a.json.gz", b"version https://git-lfs.github.com/spec/v1", "'version https://git-lfs"),
        ("a.glb", b"", "an empty file"),
    ],
)
def test_an_error_page_in_place_of_a_file_is_rejected(web_server, tmp_path, name, content, begins):
    (web_server.folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: expected .*, but found .*{begins}"):
        download(f"{web_server.url}/{name}", tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.gltf", b'\xef\xbb\xbf { "asset": {"version": "2.0"} }'),
        ("a.obj", b"\n# a comment\r\nmtllib a.mtl\r\n"),
        ("a.ply", b"ply\nformat ascii 1.0\n"),
        ("a.fbx", b"Kaydara FBX Binary  \0\x1a\0"),
        ("a.fbx", b"; FBX 7.3.0 project file\n"),
    ],
)
def test_all_mesh_formats_are_accepted(web_server, tmp_path, name, content):
    (web_server.folder / name).write_bytes(content)
    assert download(f"{web_server.url}/{name}", tmp_path / name) == sha(content)


def test_an_unexpected_hash_and_a_truncated_glb_are_rejected(web_server, tmp_path):
    (web_server.folder / "a.glb").write_bytes(glb())
    (web_server.folder / "cut.glb").write_bytes(glb()[:4000])
    url, path = f"{web_server.url}/a.glb", tmp_path / "a.glb"
    with pytest.raises(InputError, match=f"expected sha256 {'0' * 64}, but found {sha(glb())}"):
        download(url, path, "0" * 64)
    with pytest.raises(InputError, match="expected 5500 bytes according to the header, but found 4000"):
        download(f"{web_server.url}/cut.glb", tmp_path / "cut.glb")
    assert list(tmp_path.glob("*.glb*")) == []


def test_a_missing_file_is_not_retried(web_server, tmp_path):
    with pytest.raises(MissingError, match=r"absent\.glb: expected a file, but found none"):
        download(f"{web_server.url}/absent.glb", tmp_path / "absent.glb")
    assert (requests(web_server), requests(web_server, "HEAD")) == (1, 1)


def test_concurrent_downloads_report_the_error_of_each_file(web_server, tmp_path):
    wanted = []
    for number in range(12):
        name = f"{number}.glb"
        (web_server.folder / name).write_bytes(b"<html>" if number == 5 else glb(seed=number))
        wanted.append(Download(str(number), f"{web_server.url}/{name}", tmp_path / name))
    came = {done.id: (digest, reason) for done, digest, reason in download_all(wanted)}
    assert {key: digest for key, (digest, _) in came.items()} == {
        str(number): "" if number == 5 else sha(glb(seed=number)) for number in range(12)
    }
    assert came["5"][1].startswith(f"not downloaded: {web_server.url}/5.glb: expected glb, but found")


@contextlib.contextmanager
def serving(answer):
    """A server without a proxy, whose responses are written by ``answer(handler)``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            answer(self)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


def test_a_truncated_chunked_response_is_retried(tmp_path):
    content, asked = json.dumps({"asset": {"version": "2.0"}, "extras": "x" * 5000}).encode(), []

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        if handler.command == "GET":
            asked.append(handler.path)
            whole = len(asked) > 3
            part = content if whole else content[:2000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) + (b"0\r\n\r\n" if whole else b""))
        handler.close_connection = True

    with serving(answer) as url:
        assert download(f"{url}/a.gltf", tmp_path / "a.gltf") == sha(content)
    assert len(asked) > 3


def test_a_file_above_the_size_limit_is_rejected(tmp_path):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**13))
        handler.end_headers()
        handler.close_connection = True

    with (
        serving(answer) as url,
        pytest.raises(InputError, match="expected at most 17179869184 bytes, but found 10000000000000"),
    ):
        download(f"{url}/a.glb", tmp_path / "a.glb")
