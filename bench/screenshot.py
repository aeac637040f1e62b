"""`python -m bench.screenshot RUN`: draw the pictures of the documentation into docs/demo, from a finished demo and a new one.

Copied is `results.json` of the finished run. Drawn are its report and its live page, each wide, dark and narrow, and terminals
of 80 and of 120 columns in which a new demo is at work up to its pairs, for about a minute each.
"""

from __future__ import annotations

import argparse
import html
import io
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from PIL import Image

from bench.terminal import CONTROL, run_in_terminal, screen
from sbp_fast.experiment.watch.server import open_server

DEMO = Path(__file__).parent.parent / "docs" / "demo"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLORS = 64  # of a picture, so that all of them stay small
COMMAND = ("run", "demo", "--until", "pair/related")
COLUMNS = (80, 120)
SHOWN_BAR = re.compile(r"embed\]\D*[2-7]\d%")  # narrow terminals leave out what is counted
TERMINAL = """<style>body {{ margin: 0 }} pre {{ margin: 0; padding: 12px 16px; width: {columns}ch; font: 14px/1.35 monospace;
background: #16181d; color: #e6e6e6 }}</style><pre>{text}</pre>"""


class View(NamedTuple):
    """A way in which a page is looked at.

    Attributes:
        suffix: of the picture's name.
        width: of the window in pixels.
        height: of the window, and of the picture.
        color_scheme: "light" or "dark".
    """

    suffix: str
    width: int
    height: int
    color_scheme: str = "light"


VIEWS = (View("", 1120, 1560), View("-dark", 1120, 900, "dark"), View("-narrow", 390, 844))
PICTURES = (*(f"{page}{view.suffix}" for page in ("report", "watch") for view in VIEWS), *(f"terminal-{c}" for c in COLUMNS))
"""Names of the pictures, without `.png`."""


def find_browser() -> str | None:
    """Return the path of an installed browser that playwright can drive, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def main() -> None:
    """Copy `results.json` of a run, and draw all pictures."""
    parser = argparse.ArgumentParser(prog="python -m bench.screenshot", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a finished run of the demo")
    run = parser.parse_args().run
    if (browser := find_browser()) is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    shutil.copy(run / "results.json", DEMO)
    with sync_playwright() as player, player.chromium.launch(executable_path=browser, args=["--no-sandbox"]) as chromium:
        with watched(run) as address:
            for view in VIEWS:
                draw_page(chromium, (run / "report.html").absolute().as_uri(), view, f"report{view.suffix}")
                draw_page(chromium, address, view, f"watch{view.suffix}")
        for columns in COLUMNS:
            page = chromium.new_page()
            page.set_content(TERMINAL.format(columns=columns, text=html.escape("\n".join(record_run(columns)))))
            save(page.locator("pre").screenshot(), f"terminal-{columns}")


def draw_page(chromium: Any, address: str, view: View, name: str) -> None:
    """Draw the top of a page as it is seen in a view."""
    page = chromium.new_page(viewport={"width": view.width, "height": view.height}, color_scheme=view.color_scheme)
    page.goto(address)
    save(page.screenshot(), name)
    page.close()


def save(picture: bytes, name: str) -> None:
    """Write a picture with few colors."""
    with Image.open(io.BytesIO(picture)) as image:
        image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(DEMO / f"{name}.png", optimize=True)


@contextmanager
def watched(run: Path) -> Iterator[str]:
    """Serve the live page of a run, and give its address."""
    with open_server(run) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join()


def record_run(columns: int) -> list[str]:
    """Return what a terminal shows of a demo while its bar of embedded documents is half way, and then at its end.

    Raises:
        RuntimeError: the command failed, or showed no such bar.
    """
    with TemporaryDirectory() as folder:
        session = run_in_terminal([sys.executable, "-m", "sbp_fast", *COMMAND], columns, timeout=600, directory=Path(folder))
    texts = [text for _, text in session.chunks]
    bars = [number for number, text in enumerate(texts, start=1) if SHOWN_BAR.search(CONTROL.sub("", text))]
    if session.exit_code or not bars:
        raise RuntimeError(f"sbp-fast {' '.join(COMMAND)} ended with exit code {session.exit_code}: {session.lines[-1:]}")
    prompt = f"$ sbp-fast {' '.join(COMMAND)}"
    return [prompt, *screen("".join(texts[: bars[len(bars) // 2]])), "", "... and at the end:", "", prompt, *session.lines]


if __name__ == "__main__":
    main()
