"""Debian's Chromium, headless."""

import shutil

import pytest


@pytest.fixture(scope="module")
def chromium():
    """A browser with a software GPU; a missing one is a failure, never a skip.

    Of a module: while it is there, its event loop runs in the tests' thread.
    """
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.fail("expected Debian's chromium, but found none. Run `make .tools`")
    options = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()
