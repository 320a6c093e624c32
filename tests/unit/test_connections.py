"""Connections that do nothing end, and a client that is answered in the middle of its sending reads the answer."""

import asyncio
import contextlib
import time

import pytest
import uvicorn

from lrm_pl.apps import connections
from lrm_pl.apps.connections import BoundedProtocol, Lingering


async def app(scope, receive, send):
    """Answer at once, whether there is a body or not, with as many bytes as the path says."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(int(scope["path"][1:]))})


@contextlib.asynccontextmanager
async def serving():
    config = uvicorn.Config(
        Lingering(app), port=0, http=BoundedProtocol, log_level="critical", lifespan="off"
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield server, port
    server.should_exit = True
    await task


@contextlib.asynccontextmanager
async def opened(port, said):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    await writer.drain()
    yield reader, writer
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.4)
    monkeypatch.setattr(connections, "ANSWER_S", 0.4)


GET = b"GET /3 HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "said", [b"", b"GET /3 HT", GET, GET + b"G"], ids=["nothing", "half a head", "once", "once and a half"]
)
def test_a_connection_on_which_no_whole_head_comes_is_ended(said):
    async def run():
        async with serving() as (server, port), opened(port, said) as (reader, _):
            start = time.monotonic()
            with contextlib.suppress(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 5)
            assert 0.2 < time.monotonic() - start < 3
            assert not server.server_state.connections

    asyncio.run(run())


def test_a_client_that_does_not_take_its_answer_is_left_and_one_that_does_has_all_of_it():
    size = 30_000_000  # more than the buffers of both ends hold

    async def run():
        async with serving() as (server, port):
            get = f"GET /{size} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
            async with opened(port, get) as (_, deaf), opened(port, get) as (reader, _):
                deaf.transport.pause_reading()
                answer = await asyncio.wait_for(reader.read(), 10)
                assert len(answer) > size
                assert answer.startswith(b"HTTP/1.1 200")
                deadline = time.monotonic() + 5
                while server.server_state.connections and time.monotonic() < deadline:
                    await asyncio.sleep(0.05)
                assert not server.server_state.connections

    asyncio.run(run())


def test_who_takes_an_answer_slowly_has_all_of_it():
    async def run():
        async with (
            serving() as (_, port),
            opened(port, b"GET /12000000 HTTP/1.1\r\nHost: x\r\n\r\n") as (reader, _),
        ):
            start, had = time.monotonic(), 0
            while had < 12_000_000:
                part = await asyncio.wait_for(reader.read(1 << 18), 5)
                assert part, f"cut off after {had} bytes and {time.monotonic() - start:.1f} s"
                had += len(part)
                await asyncio.sleep(0.03)
            assert time.monotonic() - start > 2 * connections.ANSWER_S

    asyncio.run(run())


@pytest.mark.parametrize("hangs_up", [True, False], ids=["close", "keep-alive"])
def test_who_is_answered_while_sending_reads_the_answer_and_not_a_reset(hangs_up):
    async def run():
        async with serving() as (_, port):
            close = b"Connection: close\r\n" if hangs_up else b""
            head = b"POST /7 HTTP/1.1\r\nHost: x\r\n" + close + b"Content-Length: 8000000\r\n\r\n"
            for _ in range(20):
                async with opened(port, head) as (reader, writer):
                    writer.write(bytes(8_000_000))
                    await writer.drain()  # reads nothing before it has sent all, as simple clients do
                    answer = await asyncio.wait_for(reader.readuntil(bytes(7)), 5)
                    assert answer.startswith(b"HTTP/1.1 200")
                    if not hangs_up:  # the connection serves the next request too
                        writer.write(GET)
                        assert (await asyncio.wait_for(reader.readuntil(bytes(3)), 5)).count(
                            b"HTTP/1.1 200"
                        ) == 1

    asyncio.run(run())


def test_who_never_ends_its_request_is_left(monkeypatch):
    monkeypatch.setattr(connections, "LINGER_S", 0.3)

    async def run():
        head = b"POST /7 HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n"
        async with serving() as (server, port), opened(port, head) as (reader, _):
            start = time.monotonic()
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := await asyncio.wait_for(reader.read(100), 5):
                    answer += part
            assert answer.startswith(b"HTTP/1.1 200")
            assert time.monotonic() - start < 3
            assert not server.server_state.connections

    asyncio.run(run())


def test_more_connections_than_may_be_open_are_ended_at_once(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 2)

    async def run():
        async with serving() as (server, port), opened(port, b"") as _, opened(port, b"") as _:
            while len(server.server_state.connections) < 2:
                await asyncio.sleep(0.01)
            async with opened(port, b"") as (reader, _):
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.wait_for(reader.read(), 0.3) == b""
            assert len(server.server_state.connections) == 2

    asyncio.run(run())
