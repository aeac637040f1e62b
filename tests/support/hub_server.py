"""A stand-in for the Hugging Face Hub: the part of its HTTP interface that makes a repository and commits files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """A Hub that lets one token write.

    Attributes:
        url: its address.
        repositories: name -> whether it is private.
        files: path in a repository -> content.
        stored: hash -> content of large files.
        tokens: authorization header of each request.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url, self.token = url, token
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.tokens: list[str] = []

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON answer to a POST request."""
        if path == "/api/repos/create":
            settings = json.loads(body)
            name = "/".join(part for part in (settings.get("organization"), settings["name"]) if part)
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name] = (
                settings.get("visibility", "private" if settings.get("private") else "public") == "private"
            )
            return 200, {"url": f"{self.url}/{name}"}
        if path.endswith("/preupload/main"):
            modes = {False: "regular", True: "lfs"}
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": modes["safetensors" in name], "shouldIgnore": False} for name in names]
            return 200, {"files": files}
        if path.endswith("/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.url}/store/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.files[line["value"]["path"]] = self.stored[line["value"]["oid"]]
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            return 200, {"commitUrl": f"{self.url}/{name}/commit/0", "commitOid": "0"}
        return (200, {"errors": [], "warnings": []}) if path == "/api/validate-yaml" else (404, {})


@contextmanager
def serving_hub(token: str) -> Iterator[Hub]:
    """Run a Hub on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            authorization = self.headers.get("Authorization", "")
            hub.tokens.append(authorization)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            allowed = authorization == f"Bearer {hub.token}"
            self.reply(*(hub.answer(self.path, body) if allowed else (401, {"error": "Invalid username or password."})))

        def do_PUT(self) -> None:
            hub.stored[self.path.removeprefix("/store/")] = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(200, {})

        def do_GET(self) -> None:
            self.reply(404, {})

        def reply(self, status: int, answer: Any) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        hub = Hub(f"http://127.0.0.1:{listening.server_address[1]}", token)
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield hub
        finally:
            listening.shutdown()
