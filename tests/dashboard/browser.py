"""A headless Chromium from the system, for the tests of the page and for its screenshots."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str:
    """Its path. Without one the tests are skipped, unless REQUIRE_BROWSER says that they must run."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail("no Chromium found, and REQUIRE_BROWSER asks for one: apt-get install chromium")
    pytest.skip("no Chromium found (apt-get install chromium)")


@contextmanager
def browsing() -> Iterator[Browser]:
    """A browser with an empty profile."""
    path = chromium()
    expect.set_options(timeout=20_000)  # milliseconds; a busy machine may take its time
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()
