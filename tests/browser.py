"""Debian's Chromium, headless."""

import shutil

import pytest


@pytest.fixture(scope="module")
def chromium():
    """Launch a browser with a software GPU; fail if Chromium is missing.

    Module scope: while it is open, its event loop runs in the thread of the tests.
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
