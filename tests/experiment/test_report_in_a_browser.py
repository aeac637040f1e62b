"""The report in headless Chromium, as a reader uses it."""

from collections.abc import Iterator
from typing import Any

import pytest
from fabricated_counts import comparison, judge_counts
from fabricated_run import CONFIG, write_run

from sbp_fast.config import ArmConfig
from sbp_fast.experiment.report.contents import SECTIONS
from sbp_fast.experiment.report.page import write_report

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python, of the extra dev")
MORE_ARMS = {f"arm-{index}": 0.01 * index for index in range(2)}  # five in all, as in the demo


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    arms = CONFIG.arms | {name: ArmConfig(recipe={"weight_decay": 1.0}, seeds=(0, 1, 2)) for name in MORE_ARMS}
    directory = tmp_path_factory.mktemp("report") / "run"
    write_run(directory, comparison(**MORE_ARMS), judge_counts(), CONFIG.model_copy(update={"arms": arms}))
    return write_report(directory).as_uri()


@pytest.fixture
def open_page(browser: Any, address: str) -> Iterator[Any]:
    """A function that opens the report in a new context; it must load nothing else and raise no error."""
    contexts, requests, errors = [], [], []

    def open_(fragment: str = "", width: int = 1280, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address + fragment)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert {url.partition("#")[0] for url in requests} <= {address} and errors == []


def shown_examples(page: Any) -> list[str]:
    return [article.get_attribute("id") for article in page.locator("article").all() if article.is_visible()]


def test_contents_link_to_every_section_under_its_heading(open_page: Any) -> None:
    page = open_page()
    links = page.locator("nav a").all()
    assert [link.inner_text() for link in links] == [section.title for section in SECTIONS]
    assert [heading.inner_text() for heading in page.locator("main h2").all()] == [section.title for section in SECTIONS]
    for link, section in zip(links, SECTIONS, strict=True):
        link.click()
        assert page.url.endswith(f"#{section.anchor}")
    page.get_by_role("navigation").get_by_text("Compute ledger").click()
    assert 0 <= page.locator("#ledger").bounding_box()["y"] < 100


def test_header_buttons_sort_a_table_up_down_and_back(open_page: Any) -> None:
    page = open_page()
    table = page.locator("#arms table").first
    header = table.locator("thead th").nth(2)

    def values() -> list[float]:
        return [float(cell.get_attribute("value")) for cell in table.locator("tbody td:nth-child(3) > data").all()]

    original = values()
    assert original != sorted(original)
    for order, expected in (
        ("ascending", sorted(original)),
        ("descending", sorted(original, reverse=True)),
        ("none", original),
    ):
        header.get_by_role("button", name="Held-out bits per byte").press("Enter")
        assert header.get_attribute("aria-sort") == order and values() == expected
    table.get_by_role("button", name="change").first.click()
    assert table.locator("tbody th").last.inner_text() == "Baseline"  # has no change


def test_search_keeps_the_examples_that_hold_the_text(open_page: Any) -> None:
    page = open_page()
    search, position = page.get_by_role("searchbox"), page.locator("#position")
    assert position.inner_text() == "1 of 16"
    search.fill("GNP.EXE")
    assert 0 < int(position.inner_text().split(" of ")[1]) < 16
    assert "gnp.exe" in page.locator(f"#{shown_examples(page)[0]}").inner_text()
    page.locator("#which").select_option("unfinished")
    search.fill("no document holds this")
    assert position.inner_text() == "no example matches" and shown_examples(page) == []
    search.fill("")
    assert position.inner_text() == "1 of 1"


def test_link_to_an_example_restores_it(open_page: Any) -> None:
    page = open_page("#example-5")
    assert shown_examples(page) == ["example-5"] and page.locator("#example-5").bounding_box()["y"] < 800
    page.get_by_role("button", name="Next").click()
    assert page.url.endswith("#example-6")
    page.reload()
    assert shown_examples(page) == ["example-6"]
    page.get_by_role("searchbox").fill("no document holds this")
    page.evaluate("location.hash = '#example-2'")
    page.wait_for_function("document.getElementById('example-2').checkVisibility()")
    assert shown_examples(page) == ["example-2"] and page.get_by_role("searchbox").input_value() == ""


def test_arrow_keys_change_the_example_only_with_the_focus_in_the_browser(open_page: Any) -> None:
    page = open_page()
    page.keyboard.press("ArrowRight")
    assert shown_examples(page) == ["example-1"]
    page.locator("#browser").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert shown_examples(page) == ["example-2"]
    page.get_by_role("searchbox").focus()
    page.keyboard.press("ArrowRight")
    assert shown_examples(page) == ["example-2"]


def test_focus_is_visible_on_whatever_the_tab_key_reaches(open_page: Any) -> None:
    page = open_page()
    for _ in range(40):
        page.keyboard.press("Tab")
        style = page.evaluate(
            "(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))"
        )
        assert style == ["solid", "2px"]


def test_narrow_page_does_not_scroll_sideways_and_its_tables_do_by_keyboard(open_page: Any) -> None:
    page = open_page(width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    wide = [box for box in page.locator(".scroll").all() if box.evaluate("box => box.scrollWidth > box.clientWidth")]
    assert len(wide) >= 3
    wide[0].focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.activeElement.scrollLeft > 0")


def test_dark_page_has_light_text_and_its_print_is_light(open_page: Any) -> None:
    page = open_page(color_scheme="dark")
    color = "getComputedStyle(document.body).color"
    assert page.evaluate(color) == "rgb(233, 233, 236)"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(color) == "rgb(28, 29, 33)"


def test_print_has_all_sections_and_examples_and_no_controls(open_page: Any) -> None:
    page = open_page()
    page.emulate_media(media="print")
    assert len(shown_examples(page)) == 16
    assert all(section.is_visible() for section in page.locator("main > section").all())
    assert not any(page.locator(hidden).is_visible() for hidden in ("#previous", "#search", "nav"))
    cut = "[...document.querySelectorAll('article .text')].filter(text => text.scrollHeight > text.clientHeight + 1).length"
    assert page.evaluate(cut) == 0
    assert page.locator("#configuration pre").evaluate("pre => pre.checkVisibility({contentVisibilityAuto: true})")


def test_page_without_javascript_has_all_examples_and_no_controls(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    assert len(shown_examples(page)) == 16
    assert page.get_by_role("button").count() == 0 and not page.locator("#search").is_visible()


@pytest.mark.parametrize("options", [{}, {"color_scheme": "dark"}, {"width": 390}], ids=["light", "dark", "narrow"])
def test_axe_finds_nothing_serious(open_page: Any, options: dict[str, Any]) -> None:
    page = open_page(**options)
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    violations = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    serious = [violation for violation in violations if violation["impact"] in ("serious", "critical")]
    assert [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in serious] == []


def test_controls_of_foreign_text_are_named_and_its_direction_stays_its_own(open_page: Any) -> None:
    page = open_page()
    assert not set("\x1b\u202e") & set(page.content())
    assert "⟨U+202E⟩" in page.locator("#quality").inner_text()  # the name of a source
    assert all(text.get_attribute("dir") == "auto" for text in page.locator(".text").all())
