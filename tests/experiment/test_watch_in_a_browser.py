"""The live page in headless Chromium, as someone who waits for a run uses it."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from begun_run import BEGUN, keep_lines, write_begun_run
from fabricated_run import write_run

from sbp_fast.experiment.report.page import write_report
from sbp_fast.experiment.watch import page as page_module
from sbp_fast.experiment.watch.server import WatchServer, open_server

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python, of the extra dev")


@contextmanager
def served(run: Path) -> Iterator[WatchServer]:
    """A server of a run, whose page refreshes itself five times a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "REFRESH_SECONDS", 0.2)
        server = open_server(run)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("runs")
    begun, finished = write_begun_run(directory / "begun"), write_run(directory / "finished")
    keep_lines(begun / f"{BEGUN}.partial/metrics.jsonl", 40)
    write_report(finished)
    return {"begun": begun, "finished": finished}


@pytest.fixture(scope="module")
def servers(runs: dict[str, Path]) -> Iterator[dict[str, WatchServer]]:
    with served(runs["begun"]) as begun, served(runs["finished"]) as finished:
        yield {"begun": begun, "finished": finished}


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """A function that opens the page of a server in a new context; it must ask nobody else and raise no error."""
    contexts, requests, errors, addresses = [], [], [], []

    def open_(server: WatchServer, width: int = 1280, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        addresses.append(server.address)
        page = contexts[-1].new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "Security Policy" in message.text else None)
        page.goto(server.address)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert all(url.startswith((*addresses, "data:")) for url in requests) and errors == []


def serious(page: Any) -> list[Any]:
    violations = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    found = [violation for violation in violations if violation["impact"] in ("serious", "critical")]
    return [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in found]


@pytest.mark.parametrize(
    ("state", "options"),
    [("begun", {}), ("begun", {"color_scheme": "dark"}), ("begun", {"width": 390}), ("finished", {"width": 390})],
    ids=["light", "dark", "narrow", "finished-narrow"],
)
def test_axe_finds_nothing_serious_and_the_page_does_not_scroll_sideways(
    open_page: Any, servers: dict[str, WatchServer], state: str, options: dict[str, Any]
) -> None:
    page = open_page(servers[state], bypass_csp=True, **options)  # which refuses the script of axe as well
    assert page.evaluate("document.documentElement.scrollWidth") <= options.get("width", 1280)
    assert serious(page) == []


def test_begun_run_shows_stages_curves_and_hostile_samples_as_text(open_page: Any, servers: dict[str, WatchServer]) -> None:
    page = open_page(servers["begun"])
    row = page.get_by_role("row", name=BEGUN, exact=False).first
    assert "stopped" in row.inner_text() and "%" in row.inner_text()
    assert page.locator("#curves svg").count() == 2
    assert '<script>alert("hostile")</script>' in page.locator("#samples").inner_text()
    assert "⟨U+202E⟩" in page.locator("#samples").inner_text()
    assert page.locator("#samples img").count() == 0


def test_page_follows_the_run_and_says_when_the_server_is_gone(open_page: Any, runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["begun"], tmp_path / "run"))
    metrics = run / f"{BEGUN}.partial/metrics.jsonl"
    with served(run) as server:
        page = open_page(server)
        line = {**json.loads(metrics.read_text().splitlines()[-1]), "train/tokens": 10**12}
        with open(metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        page.get_by_role("row", name=f"{BEGUN} stopped 100%").wait_for(timeout=5000)
        assert page.locator("#connection").inner_text() == ""
    page.get_by_text("The server does not answer").wait_for(timeout=5000)
    page.context.close()


def test_finished_run_links_to_its_report(open_page: Any, servers: dict[str, WatchServer]) -> None:
    page = open_page(servers["finished"])
    page.get_by_role("link", name="the report").click()
    page.wait_for_url("**/report.html")
    assert page.locator("main h2").count() > 5


def test_page_without_javascript_shows_the_state(open_page: Any, servers: dict[str, WatchServer]) -> None:
    page = open_page(servers["begun"], java_script_enabled=False)
    assert page.locator("#stages tr").count() > 10 and page.locator("#curves svg").count() == 2


def test_dark_page_has_light_text(open_page: Any, servers: dict[str, WatchServer]) -> None:
    page = open_page(servers["begun"], color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(233, 233, 236)"
