"""The pictures of the documentation are those that one script draws, and each is shown on a page, with a text in its place."""

import re

from page_commands import PAGES, ROOT

from bench.screenshot import DEMO, PICTURES, TERMINAL
from bench.terminal import screen

LARGEST_BYTES = 1_000_000  # of all pictures


def test_pictures_are_those_of_the_script_and_small() -> None:
    assert {path.stem for path in DEMO.glob("*.png")} == set(PICTURES)
    assert sum(path.stat().st_size for path in DEMO.glob("*.png")) < LARGEST_BYTES


def test_every_picture_is_shown_on_a_page_with_a_text_in_its_place() -> None:
    shown = {}
    for page in PAGES:
        for text, link in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text("utf-8")):
            shown[(page.parent / link).resolve()] = text
    assert shown.keys() == {(ROOT / f"docs/demo/{name}.png").resolve() for name in PICTURES}
    assert all(len(text.split()) >= 4 for text in shown.values())


def test_screen_shows_what_control_sequences_leave_on_it() -> None:
    assert screen("one\r\ntwo 10%\r\x1b[2Ktwo 20%\x1b[0m\r\n\x1b[1A\x1b[2Kdone\r\n") == ["one", "done", ""]
    assert "&lt;" in TERMINAL.format(columns=80, text="&lt;")
