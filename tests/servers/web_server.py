"""A web server (aiohttp) on loopback with range requests, behind a proxy that breaks chosen requests."""

import asyncio
import threading

import pytest
from aiohttp import web

from tests.servers.faulty_proxy import FaultyProxy


@pytest.fixture
def web_server(tmp_path):
    """Serve the folder tmp_path / "web" and yield the proxy, which breaks no request by default."""
    folder, loop, ready = tmp_path / "web", asyncio.new_event_loop(), threading.Event()
    folder.mkdir()
    app = web.Application()
    app.router.add_static("/", folder)
    runner = web.AppRunner(app)
    address = []

    async def start():
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(site._server.sockets[0].getsockname()[1])
        ready.set()

    def serve():
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    proxy = FaultyProxy("127.0.0.1", address[0])
    proxy.folder = folder
    yield proxy
    proxy.stop()
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
