"""A browser without a window for the pages that commands write."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
]

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no Chromium; apt install chromium"
)

at_any_width = pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (400, "dark")])


def expect_fit(page: Any, width: int, scheme: str) -> None:
    """Fail unless a page is no wider than its window, and its text is dark where the reader wants light pages, else
    light."""
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ink = [int(part) for part in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).color"))]
    assert (max(ink) < 80) == (scheme == "light")


@contextmanager
def chromium() -> Iterator:
    """Chromium, as playwright drives it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{flag}" for flag in FLAGS])
        yield browser
        browser.close()


@contextmanager
def opened(browser, path: Path) -> Iterator:
    """A page in a browser; at the end, that it has complained of nothing and asked for nothing but itself."""
    requests, complaints = [], []
    page = browser.new_page()
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    yield page
    page.close()
    assert not complaints
    assert [url.partition("#")[0] for url in requests if not url.startswith("data:")] == [path.as_uri()]
