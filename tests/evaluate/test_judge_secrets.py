"""The key of a judge, and servers that ask for more than an answer."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from judge_server import completion, serving

from sbp_fast.config import QualityConfig
from sbp_fast.errors import UserError
from sbp_fast.evaluate.judge import Endpoint, check_judge


def settings(url: str, **more: str) -> QualityConfig:
    return QualityConfig(judge="endpoint", judge_url=url, judge_model="judge-7b", **more)  # type: ignore[arg-type]


@contextmanager
def redirecting(code: int, target: str) -> Iterator[str]:
    """Run a server that sends every request elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(code)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirection_is_refused_and_the_other_server_gets_nothing(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with serving(lambda before, body: completion("YES")) as other, redirecting(code, other.url + "/chat/completions") as url:
        with pytest.raises(UserError, match=f"answers {code}: a redirection, which is not followed"):
            list(Endpoint(settings(url, judge_key_variable="JUDGE_KEY")).ask(["one"]))
        assert other.requests == []


@pytest.mark.parametrize("key", ["sk-secret\n", "sk secret", "sk-secret\r\nHost: x", "sk-sécret"])
def test_unusable_key_is_refused_before_work_without_being_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(UserError, match="environment variable JUDGE_KEY: holds a character") as raised:
        check_judge(settings("http://x", judge_key_variable="JUDGE_KEY"))
    assert "secret" not in str(raised.value)


def test_key_in_the_answer_of_a_server_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    refused = pytest.raises(UserError, match=r"answers 401: wrong key: \(key\)")
    with serving(lambda before, body: (401, b"wrong key: sk-secret")) as server, refused:
        list(Endpoint(settings(server.url, judge_key_variable="JUDGE_KEY")).ask(["one"]))


@pytest.mark.parametrize("url", ["https://me:secret@host/v1", "https://host/v1?key=secret", "ftp://me:secret@host"])
def test_url_with_a_secret_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError) as raised:
        check_judge(settings(url))
    assert "secret" not in str(raised.value)
    assert "secret" not in json.dumps(Endpoint(settings(url)).identity)
