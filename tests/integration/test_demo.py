"""Tests of `lrm demo` in Chromium."""

import asyncio
import io
import json
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
import trimesh
from PIL import Image

from lrm_pl.inference.demo_page import QUEUE, clean_up
from tests.servers.lrm_server import Served

# Playwright closes its event loop and pipes in its own thread.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def page_server(pretrained):
    server = Served("demo", "--ckpt", pretrained, "--device", "cpu")
    yield server
    try:
        server.stop()
    finally:
        server.kill()


@pytest.fixture
def visitor(chromium, page_server):
    context = chromium.new_context(viewport={"width": 1300, "height": 1150}, accept_downloads=True)
    page = context.new_page()
    page.goto(page_server.address, wait_until="domcontentloaded")
    page.wait_for_selector("#go", timeout=60_000)
    yield page
    context.close()


def test_an_uploaded_image_is_reconstructed_and_the_mesh_is_downloaded(visitor, tmp_path):
    rgba = np.zeros((80, 60, 4), dtype=np.uint8)
    rgba[20:60, 10:40] = (200, 100, 50, 255)
    Image.fromarray(rgba).save(tmp_path / "object.png")
    visitor.set_input_files("#photo input[type=file]", tmp_path / "object.png")
    visitor.wait_for_selector("#photo img", timeout=30_000)
    visitor.click("#go")
    visitor.wait_for_function(
        "document.querySelector('#summary')?.innerText.includes('triangles')", timeout=120_000
    )
    visitor.wait_for_selector("#mesh canvas", timeout=60_000)
    visitor.wait_for_function("document.querySelector('#orbit video')?.readyState >= 2", timeout=60_000)
    assert visitor.evaluate("document.querySelector('#orbit video').videoWidth") == 256
    with visitor.expect_download(timeout=60_000) as download:
        visitor.click("#download")
    download.value.save_as(tmp_path / "mesh.glb")
    (shape,) = trimesh.load(tmp_path / "mesh.glb", process=False).geometry.values()
    summary = visitor.inner_text("#summary")
    assert f"{len(shape.faces):,} triangles" in summary
    # the canvas shows more than the background
    deadline = time.monotonic() + 30
    while _dark_fraction(visitor, "#mesh canvas") < 0.01:
        assert time.monotonic() < deadline
        visitor.wait_for_timeout(200)
    # old outputs are cleared
    visitor.locator(
        "#photo button[aria-label='Clear'], #photo button[aria-label='Remove Image']"
    ).first.click()
    visitor.click("#go")
    visitor.wait_for_selector("text=Choose an image first.", timeout=30_000)
    assert "triangles" not in visitor.inner_text("#summary")
    assert not visitor.query_selector("#orbit video")


def _dark_fraction(page, selector):
    """Return the fraction of dark pixels in a screenshot of an element."""
    image = Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")
    return (np.asarray(image) < 200).any(axis=-1).mean()


def test_an_example_is_selected_and_reconstructed(visitor):
    visitor.locator("button.gallery-item").first.click()
    visitor.wait_for_selector("#photo img", timeout=30_000)
    visitor.click("#go")
    visitor.wait_for_function(
        "document.querySelector('#summary')?.innerText.includes('triangles')", timeout=120_000
    )


def test_invalid_and_missing_images_show_an_error_message(visitor, tmp_path):
    visitor.click("#go")
    visitor.wait_for_selector("text=Choose an image first.", timeout=30_000)
    (tmp_path / "bad.png").write_bytes(b"this is no image")
    visitor.set_input_files("#photo input[type=file]", tmp_path / "bad.png")
    visitor.wait_for_timeout(1500)
    visitor.click("#go")
    visitor.wait_for_selector("text=expected an image", timeout=30_000)


@pytest.mark.parametrize("ending", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.soak)])
def test_the_page_ignores_proxies_listens_on_loopback_and_leaves_no_files(
    pretrained, tmp_path, monkeypatch, ending
):
    """Serve the page while the proxies of the environment do not respond."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    # nohup ignores SIGHUP, and child processes inherit that
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        server = Served("demo", "--ckpt", pretrained, "--device", "cpu")
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        deadline = time.monotonic() + 60
        while f"at {server.address}. Press" not in server.said() and time.monotonic() < deadline:
            time.sleep(0.2)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.address) as page:
            assert (page.status, b'"title":"lrm"' in page.read()) == (200, True)
        connections = psutil.Process(server.process.pid).net_connections()
        assert {c.laddr.ip for c in connections if c.status == "LISTEN"} == {"127.0.0.1"}
        assert list(tmp_path.glob("lrm-demo-*"))
        server.process.send_signal(ending)
        server.process.wait(timeout=30)
    finally:
        said = server.kill()
    assert f"at {server.address}. Press" in said
    assert "Traceback" not in said
    deadline = time.monotonic() + 10
    while list(tmp_path.glob("lrm-demo-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list(tmp_path.glob("lrm-demo-*"))


async def joined(session, address, fn, photo, number, *, until="process_completed", resolution=64, data=None):
    """Request a mesh as the page does; return the messages up to the given type."""
    body = {"data": data or [photo, resolution, 0], "fn_index": fn, "session_hash": f"visitor{number}"}
    async with session.post(f"{address}/gradio_api/queue/join", json=body) as answer:
        if answer.status != 200:
            return [{"msg": "refused", "status": answer.status, "output": await answer.json()}]
    messages = [{"msg": "joined"}]
    if until == "joined":
        return messages
    async with session.get(f"{address}/gradio_api/queue/data?session_hash=visitor{number}") as stream:
        async for line in stream.content:
            if line.startswith(b"data: "):
                messages.append(json.loads(line[6:]))
                if messages[-1]["msg"] in (until, "close_stream"):
                    break
    return messages


def test_uploads_and_the_queue_are_limited_and_urls_are_rejected(page_server, tmp_path):
    rgba = np.zeros((80, 60, 4), dtype=np.uint8)
    rgba[20:60, 10:40] = 255
    Image.fromarray(rgba).save(tmp_path / "object.png")
    address = page_server.address

    async def run():
        async with aiohttp.ClientSession() as session:

            async def upload(content):
                form = aiohttp.FormData()
                form.add_field("files", content, filename="a.png")
                async with session.post(f"{address}/gradio_api/upload", data=form) as answer:
                    return answer.status, await answer.text()

            assert (await upload(bytes(17_000_000)))[0] == 413
            status, uploaded = await upload((tmp_path / "object.png").read_bytes())
            assert status == 200
            (path,) = json.loads(uploaded)
            kept = Path(path).parents[1]
            _, writer = await asyncio.open_connection("127.0.0.1", page_server.port)
            writer.write(
                b"POST /gradio_api/upload HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n"
                b"Content-Type: multipart/form-data; boundary=B\r\n\r\n--B\r\nContent-Disposition: form-data; "
                b'name="files"; filename="b.png"\r\n\r\n' + bytes(2_000_000)
            )
            await writer.drain()
            while not (broken_off := [file for file in kept.glob("tmp*") if file.is_file()]):
                await asyncio.sleep(0.05)
            writer.close()
            clean_up(kept, 3600.0)
            assert broken_off[0].exists()
            clean_up(kept, 0.0)
            assert not broken_off[0].exists()
            assert Path(path).exists()
            async with session.get(f"{address}/config") as answer:
                calls = (await answer.json())["dependencies"]
            file = {"meta": {"_type": "gradio.FileData"}}
            for call in (call for call in calls if call["inputs"]):  # of the button and of the examples
                url = {**file, "path": "http://127.0.0.1:9/a.png"}
                last = (await joined(session, address, call["id"], url, f"url{call['id']}"))[-1]
                assert not last["success"]
                assert "Upload the image; URLs such as" in last["output"]["error"]
                other = {**file, "path": "/etc/passwd"}
                last = (await joined(session, address, call["id"], other, f"file{call['id']}"))[-1]
                assert not last["success"]
            make = next(call["id"] for call in calls if len(call["inputs"]) == 3)
            pick = next(call["id"] for call in calls if len(call["inputs"]) == 1)
            # gradio updates the page when a visitor picks an example
            assert (await joined(session, address, pick, 0, "picked", data=[0]))[-1]["success"]
            url = {**file, "path": "http://127.0.0.1:9/a.png"}
            last = (await joined(session, address, make, url, "picked"))[-1]
            assert "Upload the image; URLs such as" in last["output"]["error"]
            photo = {**file, "path": path}
            last = (
                await joined(session, address, make, photo, "first", until="process_starts", resolution=384)
            )[-1]
            assert last["msg"] == "process_starts"
            joins = [joined(session, address, make, photo, k, until="joined") for k in range(24)]
            answers = await asyncio.gather(*joins)
            refused = [answer for (answer,) in answers if answer["msg"] == "refused"]
            assert len(refused) == 24 - QUEUE
            assert {answer["status"] for answer in refused} == {503}
            assert "full" in str(refused[0]["output"])

    with ThreadPoolExecutor(1) as another:  # Playwright's event loop runs in this thread
        another.submit(asyncio.run, run()).result()
