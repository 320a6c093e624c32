"""Connections that do nothing end, and a client that is refused in the middle of its sending reads why."""

import asyncio
import contextlib
import time

import pytest
import uvicorn

from lrm_pl.apps import connections
from lrm_pl.apps.connections import BoundedProtocol, Refusal


async def app(scope, receive, send):
    """Refuse /refused before its body is read; answer everything else with as many bytes as its path says."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/refused":
        await Refusal({"detail": "too large"}, 413)(scope, receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": bytes(int(scope["path"][1:]))})


@contextlib.asynccontextmanager
async def serving():
    config = uvicorn.Config(app, port=0, http=BoundedProtocol, log_level="critical", lifespan="off")
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


def test_who_is_refused_while_sending_reads_the_answer_and_not_a_reset():
    async def run():
        async with serving() as (_, port):
            for _ in range(20):
                head = b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n"
                async with opened(port, head) as (reader, writer):
                    writer.write(bytes(8_000_000))
                    await writer.drain()  # reads nothing before it has sent all, as simple clients do
                    answer = await asyncio.wait_for(reader.read(), 5)
                assert answer.startswith(b"HTTP/1.1 413")
                assert answer.endswith(b'{"detail":"too large"}')

    asyncio.run(run())
