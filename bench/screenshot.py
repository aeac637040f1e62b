"""`python -m bench.screenshot RUN`: copy a finished demo's results into docs/demo, and draw the top of its report there."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

DEMO = Path(__file__).parent.parent / "docs" / "demo"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1120, 1560


def find_browser() -> str | None:
    """Return the path of an installed browser that playwright can drive, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def main() -> None:
    """Copy `results.json` of a run, and draw its `report.html`."""
    parser = argparse.ArgumentParser(prog="python -m bench.screenshot", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    run = parser.parse_args().run
    if (browser := find_browser()) is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    shutil.copy(run / "results.json", DEMO)
    with sync_playwright() as player, player.chromium.launch(executable_path=browser, args=["--no-sandbox"]) as chromium:
        page = chromium.new_page()
        page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        page.goto((run / "report.html").absolute().as_uri())
        page.screenshot(path=DEMO / "report.png")


if __name__ == "__main__":
    main()
