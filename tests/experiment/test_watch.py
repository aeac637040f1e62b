"""The live page of a run: its state, its parts, and its server."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from begun_run import BEGUN, SECONDS, keep_lines, write_begun_run
from fabricated_run import CONFIG, write_run
from watching import snapshot

from sbp_fast.cli import app
from sbp_fast.errors import UserError
from sbp_fast.experiment.graph import stages_of
from sbp_fast.experiment.report.page import write_report
from sbp_fast.experiment.time_estimate import TimeEstimate
from sbp_fast.experiment.watch.page import LivePage
from sbp_fast.experiment.watch.server import WatchServer, open_server
from sbp_fast.experiment.watch.state import RunReader, StageState
from sbp_fast.pipeline.output import is_locked, locked

METRICS = f"{BEGUN}.partial/metrics.jsonl"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_begun_run(tmp_path_factory.mktemp("begun") / "run")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("finished") / "run")
    write_report(run)
    return run


@pytest.fixture
def copied(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def stage(run: Path, name: str = BEGUN) -> StageState:
    return next(state for state in RunReader(run).read().stages if state.stage.name == name)


def test_stages_are_done_running_stopped_or_waiting(begun: Path) -> None:
    assert (stage(begun).status, stage(begun, "compare").status) == ("stopped", "waiting")
    with locked(begun / BEGUN):
        state = RunReader(begun).read()
    assert (state.count("running"), state.count("stopped")) == (1, 0)
    assert stage(begun, "embed").status == "done" and [each.stage.name for each in state.stages] == list(stages_of(CONFIG))


def test_lock_is_seen_without_being_touched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not is_locked(out)
    with locked(out):
        assert is_locked(out)
    (tmp_path / ".out.lock").touch()  # left behind by a process that was killed
    assert not is_locked(out)


def test_begun_training_has_its_seconds_its_share_and_the_time_left(copied: Path) -> None:
    keep_lines(copied / METRICS, 40)
    state, tokens = stage(copied), 40 * 8192
    total = TimeEstimate(CONFIG, [], 1).cost(state.stage).tokens
    assert state.seconds == SECONDS and state.share == pytest.approx(tokens / total)
    assert state.left == pytest.approx(SECONDS * (total - tokens) / tokens)


def test_metrics_are_read_as_they_grow_and_half_a_line_is_left_for_later(copied: Path) -> None:
    path, reader = copied / METRICS, RunReader(copied)
    lines = path.read_text().splitlines(keepends=True)
    keep_lines(path, 10, more=lines[10][:20])
    assert len(reader.read().losses[BEGUN].training) == 10
    with open(path, "a") as file:
        file.write("".join(lines[10:])[20:])
    losses = reader.read().losses[BEGUN]
    assert losses == RunReader(copied).read().losses[BEGUN] and (len(losses.training), len(losses.heldout)) == (120, 3)
    keep_lines(path, 5)  # a stopped attempt had written more than its checkpoint counts on
    assert len(reader.read().losses[BEGUN].training) == 5


def test_damaged_metrics_are_named_on_the_page(copied: Path) -> None:
    keep_lines(copied / METRICS, 3, more="[1]\n")
    parts = LivePage(copied).parts()
    assert list(parts) == ["title", "summary"] and "metrics.jsonl: holds a line that is none of metrics" in parts["summary"]


def test_parts_show_the_newest_samples_with_hostile_text_escaped(begun: Path) -> None:
    parts = LivePage(begun).parts()
    page = "".join(parts.values())
    assert "<script" not in page and "<img" not in page and not set("\x1b\u202e") & set(page)
    assert parts["samples"].count("&lt;script&gt;alert") == 2 and "after 40 steps" in parts["samples"]  # a text and a seed
    assert parts["curves"].count("<svg") == 2 and "baseline-seed-2" in parts["curves"]
    assert re.search(rf'{BEGUN}</th>\s*<td>stopped\s*<data value="[\d.]+">\d+%', parts["stages"])


def test_drawing_is_made_again_only_with_new_points(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, drawn = LivePage(copied), []
    monkeypatch.setattr("sbp_fast.experiment.report.plots.loss_plot", lambda name, *_: drawn.append(name) or "<svg></svg>")
    page.parts()
    page.parts()
    assert sorted(drawn) == ["arms", drawn[-1]] and len(drawn) == 2
    keep_lines(copied / METRICS, 7)
    page.parts()
    assert len(drawn) == 3 and drawn[2] == "arms"


def test_finished_run_links_to_its_report(finished: Path) -> None:
    parts = LivePage(finished).parts()
    assert 'All stages are done: <a href="report.html">' in parts["summary"]
    assert "waiting" not in parts["stages"] and "stopped" not in parts["stages"]


@pytest.fixture(scope="module")
def server(begun: Path) -> Iterator[WatchServer]:
    with open_server(begun) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: WatchServer, path: str, method: str = "GET", host: str = "") -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", server.server_port)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_server_answers_on_the_loopback_address_with_page_and_state_and_writes_nothing(
    server: WatchServer, begun: Path
) -> None:
    assert server.server_address[0] == "127.0.0.1"
    before = snapshot(begun)
    with urllib.request.urlopen(server.address) as response:
        policy, page = response.headers["Content-Security-Policy"], response.read().decode()
    assert "default-src 'none'" in policy and "sha256-" in policy and page.startswith("<!doctype html>")
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", page)
    status, state = ask(server, "/state.json")
    assert status == 200 and list(json.loads(state)) == ["title", "summary", "stages", "curves", "samples"]
    assert snapshot(begun) == before


@pytest.mark.parametrize(
    "path", ["/config.toml", "/../config.toml", "/%2e%2e/run/config.toml", "//etc/passwd", "/report.html", "/state.json/.."]
)
def test_other_names_are_refused(server: WatchServer, path: str) -> None:
    assert ask(server, path)[0] == 404  # the run has no report yet


def test_report_that_is_a_link_out_of_the_run_is_refused(server: WatchServer, begun: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (begun / "report.html").symlink_to(tmp_path / "secret")
    try:
        assert ask(server, "/report.html")[0] == 404
    finally:
        (begun / "report.html").unlink()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_other_methods_are_refused(server: WatchServer, method: str) -> None:
    assert ask(server, "/state.json", method)[0] == 501


def test_other_hosts_are_refused(server: WatchServer) -> None:
    assert ask(server, "/state.json", host=f"evil.example:{server.server_port}")[0] == 403
    assert ask(server, "/state.json", host=f"localhost:{server.server_port}")[0] == 200


def test_directory_that_is_no_run_and_a_port_in_use_are_refused(server: WatchServer, begun: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run: it has no config\.toml"):
        open_server(tmp_path)
    with pytest.raises(UserError, match=f"--port {server.server_port}: cannot be listened on"):
        open_server(begun, server.server_port)


def test_once_prints_the_stages_and_serves_nothing(begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["watch", str(begun), "--once"], standalone_mode=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    (row,) = (line for line in lines if line[0] == BEGUN)
    assert row[1] == "stopped" and row[2].endswith("%") and row[3] == "10m00s"
    assert lines[-1][:3] == [str(sum(line[1:2] == ["done"] for line in lines)), "of", str(len(stages_of(CONFIG)))]


def test_ctrl_c_ends_the_command_in_one_line(begun: Path) -> None:
    command = [sys.executable, "-m", "sbp_fast", "watch", str(begun), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    assert re.fullmatch(rf"watching {begun} at http://127\.0\.0\.1:\d+/; Ctrl-C ends it\n", process.stdout.readline())
    os.kill(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=20)
    assert (process.returncode, rest) == (0, f"no longer watching {begun}\n")
