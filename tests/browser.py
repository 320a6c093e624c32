"""Debian's Chromium, headless, and servers of ours that it opens."""

import shutil
import socket
import subprocess
import sys
import time

import pytest


@pytest.fixture(scope="module")
def chromium():
    """A browser with a software GPU; a missing one is a failure, never a skip.

    Of a module: while it is there, its event loop runs in the tests' thread.
    """
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.fail("expected Debian's chromium, found none; run `make .tools`")
    options = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


class Page:
    """A command of ours that serves a page, as a process of its own."""

    def __init__(self, *arguments, cwd=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "lrm_pl", *map(str, arguments), "--port", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd
        )
        self.address = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.1)
        self.kill()
        pytest.fail("it does not listen")

    def kill(self):
        self.process.kill()
        return self.process.communicate()[0]
