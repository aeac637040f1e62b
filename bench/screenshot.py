"""`python -m bench.screenshot RUN`: copy a finished demo's results into docs/demo, and draw the top of its report there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sbp_fast.errors import UserError

DEMO = Path(__file__).parent.parent / "docs" / "demo"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1120, 1560


def main(run: Path) -> None:
    """Copy `results.json` of a run, and draw its `report.html` with an installed browser."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError("browser", f"none of {', '.join(BROWSERS)} is installed", "install one")
    shutil.copy(run / "results.json", DEMO)
    with sync_playwright() as player:
        page = player.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        page.goto((run / "report.html").absolute().as_uri())
        page.screenshot(path=DEMO / "report.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
