"""HTTP status and body for valid, invalid and hostile requests to `lrm serve`, run as a process."""

import asyncio
import base64
import gzip
import io
import re
import signal
import socket
import time

import aiohttp
import numpy as np
import pytest
from PIL import Image

from lrm_pl.inference.server import describe_non_image
from tests.builders import encoded, png
from tests.servers.lrm_server import Served

LIMITS = [
    "--megabytes",
    "1",
    "--megapixels",
    "2",
    "--queue",
    "3",
    "--upload-seconds",
    "2",
    "--resolution",
    "64",
]


def photo(seed=0):
    rgba = np.zeros((64, 64, 4), dtype=np.uint8)
    rgba[10:50, 15:45, :3] = np.random.default_rng(seed).integers(0, 256, 3)
    rgba[10:50, 15:45, 3] = 255
    return encoded(Image.fromarray(rgba))


#: Hostile request -> body and expected status.
HOSTILE = {
    "bomb": (png(30_000, 30_000), 413),
    "many pixels": (encoded(Image.new("L", (2000, 2000))), 413),
    "truncated": (photo()[:120], 400),
    "truncated jpeg": (encoded(Image.new("RGB", (64, 64), "red"), "JPEG")[:300], 400),
    "text": (b"hello" * 100, 415),
    "zip": (b"PK\x03\x04" + bytes(200), 415),
    "empty": (b"", 415),
    "huge": (bytes(1_500_000), 413),
    "transparent": (encoded(Image.new("RGBA", (32, 32))), 400),
}


def serve(folder, *options):
    return Served("serve", "--ckpt", folder, "--device", "cpu", *LIMITS, *options)


@pytest.fixture(scope="module")
def server(pretrained):
    """A shared server; checks a clean shutdown at the end."""
    made = serve(pretrained)
    try:
        yield made
        said = made.stop()
    finally:
        made.kill()
    assert made.process.returncode == -signal.SIGTERM, (
        said
    )  # uvicorn raises the signal again after the shutdown
    assert "Traceback" not in said
    assert "Finished server process" in said


async def ask(session, server, body, query="?resolution=32"):
    async with session.post(f"{server.address}/reconstruct{query}", data=io.BytesIO(body)) as answer:
        return answer.status, await answer.read()


async def mixed(server, count, hostile_share, at_once=3):
    """Send requests, some hostile; return the statuses of each type."""
    rng, found, turn = np.random.default_rng(0), {}, asyncio.Semaphore(at_once)
    kinds = list(HOSTILE)

    async def one(session, number):
        kind = kinds[number % len(kinds)] if rng.random() < hostile_share else "good"
        body = photo(number) if kind == "good" else HOSTILE[kind][0]
        async with turn:
            status, content = await ask(session, server, body)
        assert (content[:4] == b"glTF") == (status == 200), (kind, status, content[:200])
        found.setdefault(kind, []).append(status)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(one(session, number) for number in range(count)))
    return found


def expected(kind):
    return 200 if kind == "good" else HOSTILE[kind][1]


def test_requests_have_the_documented_status_and_are_counted(server):
    async def counted(session):
        async with session.get(f"{server.address}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        return {
            name: float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    async def run():
        async with aiohttp.ClientSession() as session:
            before = await counted(session)
            for kind, (body, status) in HOSTILE.items():
                found, content = await ask(session, server, body)
                assert found == status, (kind, found, content)
                assert b"detail" in content
            form = aiohttp.FormData({"file": io.BytesIO(photo())})
            async with session.post(f"{server.address}/reconstruct", data=form) as answer:
                assert (answer.status, "it is a form" in await answer.text()) == (415, True)
            status, glb = await ask(session, server, photo())
            assert (status, glb[:4]) == (200, b"glTF")
            assert (await ask(session, server, photo(), "?resolution=4096"))[0] == 422
            assert (await ask(session, server, photo(), "?resolution=32&threshold=1e9"))[0] == 422
            assert (await ask(session, server, photo(), "?resolution=32&threshold=inf"))[0] == 422
            status, content = await ask(session, server, photo(), "?res=32&texture=1")
            assert (status, b"texture" in content, b"Extra inputs are not permitted" in content) == (
                422,
                True,
                True,
            )
            assert (await ask(session, server, photo(), "?resolution=32&faces=1000000000"))[0] == 422
            async with session.get(f"{server.address}/health") as answer:
                assert (await answer.json())["status"] == "ok"
            counts = {name: value - before.get(name, 0.0) for name, value in (await counted(session)).items()}
            assert counts['lrm_requests_total{status="200"}'] == 1
            assert counts['lrm_requests_total{status="415"}'] == 4
            assert counts['lrm_requests_total{status="422"}'] == 5
            assert counts['lrm_stage_seconds_count{stage="planes"}'] == 1
            async with session.get(f"{server.address}/docs") as answer:
                assert answer.status == 200

    asyncio.run(run())


def test_bodies_that_are_not_images_are_described():
    content = photo()
    stripped = content.translate(None, b"\r\n\0")
    jpeg = encoded(Image.new("RGB", (64, 64), "red"), "JPEG")
    for body, kind, named in (
        (b"", "", "an empty body"),
        (b'{"image": "..."}', "", "JSON"),
        (b'"abc"', "application/json", "JSON"),
        (base64.b64encode(content), "text/plain", "text such as base64"),
        (b"data:image/png;base64," + base64.b64encode(content), "", "text such as base64"),
        (gzip.compress(content), "", "gzip"),
        (b"--x", "multipart/form-data; boundary=x", "a form"),
        (stripped, "application/x-www-form-urlencoded", "an image without newlines and null bytes"),
        (jpeg.translate(None, b"\r\n\0"), "", "an image without newlines and null bytes"),
        (content, "application/x-www-form-urlencoded", ""),  # curl --data-binary
        (content, "application/json", ""),
        (jpeg, "", ""),
        (b"\x00\x01\x02", "", ""),
    ):
        found = describe_non_image(body, kind)
        assert found.startswith(named) if named else not found, (body[:20], found)


def test_health_checks_trailing_slashes_and_unknown_paths(server):
    async def run():
        async with aiohttp.ClientSession() as session:
            for path in ("/health", "/health/"):
                async with session.head(server.address + path) as answer:
                    assert (answer.status, await answer.read()) == (200, b"")
            async with session.post(
                f"{server.address}/reconstruct/?resolution=32", data=photo(), allow_redirects=False
            ) as answer:
                assert (answer.status, (await answer.read())[:4]) == (200, b"glTF")
            async with session.get(server.address, allow_redirects=False) as answer:
                assert (answer.status, answer.headers["Location"]) == (307, "/docs")
            for method, path, status in (("GET", "/nosuch", 404), ("GET", "/reconstruct", 405)):
                async with session.request(method, server.address + path) as answer:
                    assert answer.status == status
                    assert ". See GET /docs." in (await answer.json())["detail"]
            async with session.post(f"{server.address}/reconstruct", json={"image": "x"}) as answer:
                assert answer.status == 415
                assert "it is JSON. Use `curl --data-binary @photo.png`" in (await answer.json())["detail"]

    asyncio.run(run())


def test_a_repeated_parameter_is_rejected(server):
    async def run():
        async with aiohttp.ClientSession() as session:
            status, content = await ask(session, server, photo(), "?resolution=32&resolution=48")
            assert (status, b"resolution=32&resolution=48" in content) == (422, True)

    asyncio.run(run())


def test_slow_uploads_time_out_and_large_uploads_are_rejected(server):
    def raw(head, body=b""):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
            line.sendall(f"POST /reconstruct HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
            return line.recv(65536).decode()

    start = time.monotonic()
    assert raw("Content-Length: 1000", b"only this").startswith("HTTP/1.1 408")
    assert time.monotonic() - start < 6
    assert raw("Content-Length: 999999999999").startswith("HTTP/1.1 413")
    chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    assert raw("Transfer-Encoding: chunked", chunk).startswith("HTTP/1.1 413")


def test_requests_beyond_the_queue_are_rejected_and_late_requests_time_out(pretrained):
    server = serve(pretrained, "--seconds", "0.5")
    try:

        async def run():
            async with aiohttp.ClientSession() as session:
                return await asyncio.gather(
                    *(ask(session, server, photo(), "?resolution=64") for _ in range(12))
                )

        statuses = [status for status, _ in asyncio.run(run())]
        assert statuses.count(503) >= 4
        assert set(statuses) <= {200, 503, 504}
        assert asyncio.run(one_more(server)) in (200, 504)
    finally:
        server.kill()


def test_canceled_requests_are_dropped_and_a_stopped_server_completes_the_running_request(pretrained):
    server = serve(pretrained, "--queue", "20")

    async def cancel():
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=0.4)) as session:
            await asyncio.gather(
                *(ask(session, server, photo(), "?resolution=64") for _ in range(16)), return_exceptions=True
            )
        async with aiohttp.ClientSession() as session:
            deadline = time.monotonic() + 20
            while True:
                async with session.get(f"{server.address}/health") as answer:
                    if not (await answer.json())["waiting"]:
                        break
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            async with session.get(f"{server.address}/metrics") as answer:
                return await answer.text()

    async def stop():
        async with aiohttp.ClientSession() as session:
            asked = [asyncio.create_task(ask(session, server, photo(), "?resolution=64")) for _ in range(16)]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            server.process.send_signal(signal.SIGTERM)
            return [status for status, _ in await asyncio.gather(*asked)]

    try:
        dropped = re.search(r'lrm_requests_total\{status="499"\} (\d+)', asyncio.run(cancel()))
        statuses = asyncio.run(stop())
        said = server.stop()
    finally:
        server.kill()
    assert int(dropped[1]) >= 8
    assert set(statuses) == {200, 503}
    assert statuses.count(503) >= 8
    assert "Traceback" not in said


async def one_more(server):
    async with aiohttp.ClientSession() as session:
        return (await ask(session, server, photo()))[0]


def test_a_mixture_of_valid_and_hostile_requests(server):
    found = asyncio.run(mixed(server, 30, 0.5))
    assert sum(map(len, found.values())) == 30
    for kind, statuses in found.items():
        assert set(statuses) == {expected(kind)}, kind
    assert server.process.poll() is None


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_thousand_mixed_requests_neither_crash_nor_leak(server):
    asyncio.run(mixed(server, 100, 0.05))
    before = server.memory()
    start = time.monotonic()
    found = asyncio.run(mixed(server, 1000, 0.05))
    after = server.memory()
    print(f"\n1000 requests in {time.monotonic() - start:.0f} s; memory {before:.0f} -> {after:.0f} MB")
    print("| request | sent | status |\n|---|---:|---|")
    for kind, statuses in sorted(found.items()):
        print(f"| {kind} | {len(statuses)} | {', '.join(map(str, sorted(set(statuses))))} |")
        assert set(statuses) == {expected(kind)}, kind
    assert after < before + 50
