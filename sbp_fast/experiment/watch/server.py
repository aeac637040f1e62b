"""The server of the live page: on the loopback address, three names, and only reading."""

from __future__ import annotations

import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sbp_fast.errors import UserError
from sbp_fast.experiment.report.page import REPORT
from sbp_fast.experiment.watch.page import LivePage
from sbp_fast.pipeline.interrupts import ended_by_signal
from sbp_fast.pipeline.progress import print_line

LOOPBACK = "127.0.0.1"
STATE = "state.json"
HTML, JSON = "text/html; charset=utf-8", "application/json"
REPORT_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def watch(run: Path, port: int) -> None:
    """Serve the live page of a run until SIGINT or SIGTERM comes.

    Args:
        run: directory of the run.
        port: of the loopback address; 0 takes a free one.

    Raises:
        UserError: the directory is no run, or the port is not free.
    """
    with open_server(run, port) as server, ended_by_signal():
        print_line(f"watching {run} at {server.address}; Ctrl-C ends it")
        server.serve_forever()
    print_line(f"no longer watching {run}")


def open_server(run: Path, port: int = 0) -> WatchServer:
    """Return the server of a run, which listens.

    Raises:
        UserError: see `watch`.
    """
    page = LivePage(run)
    page.reader.read()
    try:
        return WatchServer(run, page, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}", f"cannot be listened on: {error}", "give another, or 0 for a free one") from None


class WatchServer(ThreadingHTTPServer):
    """A server of one live page; requests are answered one at a time, as they share what was read before."""

    def __init__(self, run: Path, page: LivePage, port: int) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.run, self.page, self.lock = run, page, threading.Lock()

    @property
    def address(self) -> str:
        """URL of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    @property
    def hosts(self) -> set[str]:
        """Names under which a browser may ask: another one comes from a page of others whose name leads here."""
        return {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}

    def answer(self, name: str) -> tuple[str, bytes, str] | None:
        """Return the type, the content and the security policy of what has a name; None where the page has no such thing."""
        with self.lock:
            if name == "/":
                return HTML, self.page.page().encode(), self.page.security_policy
            if name == f"/{STATE}":
                return JSON, json.dumps(self.page.parts()).encode(), "default-src 'none'"
            report = self.run / REPORT
            if name == f"/{REPORT}" and report.is_file() and not report.is_symlink():
                return HTML, report.read_bytes(), REPORT_POLICY
        return None


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    server_version, sys_version = "sbp-fast", ""

    def do_GET(self) -> None:
        """Answer with a page, the state or the report, or refuse."""
        if self.headers.get("Host") not in self.server.hosts:
            self.send_error(HTTPStatus.FORBIDDEN, "This page is for this machine alone")
            return
        try:
            answer = self.server.answer(self.path)
        except (UserError, OSError) as error:  # the run was removed, say; the page tells so by what it cannot fetch
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "The run cannot be read", str(error))
            return
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, content, policy = answer
        self.send_response(HTTPStatus.OK)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Content-Security-Policy": policy}
        headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except ConnectionError:  # the browser has left
            self.close_connection = True

    def log_message(self, format: str, *values: Any) -> None:
        """Print nothing: a page asks every few seconds."""
