"""A browser for the tests that open pages."""

from collections.abc import Iterator
from typing import Any

import pytest

from bench.screenshot import find_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Yield a running Chromium without a window; without one, the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
    path = find_browser()
    if path is None:
        pytest.skip("needs an installed Chromium")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
