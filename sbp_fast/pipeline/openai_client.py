"""Requests to OpenAI-compatible servers: the key, several requests at a time, and further attempts where one fails."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.credentials import without_credentials
from sbp_fast.pipeline.files import dump_json

ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0  # doubled after each attempt
REDIRECTIONS = range(300, 400)
RETRIED_STATUS_CODES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ServerSettings:
    """How a server is asked, as the configuration says.

    Attributes:
        url: base URL, such as http://localhost:8000/v1.
        key_variable: environment variable with the key; "" sends none.
        requests: in flight at a time.
        timeout_seconds: of one answer.
        url_name, key_name: keys of the configuration that hold the first two, for messages.
        remedy: what to do where the server refuses.
    """

    url: str
    key_variable: str
    requests: int
    timeout_seconds: float
    url_name: str
    key_name: str
    remedy: str

    def check(self) -> None:
        """Refuse unusable settings, without sending a request.

        Raises:
            UserError: the URL is none or has secrets in it, or the key is not set.
        """
        if urlsplit(self.url).scheme not in ("http", "https"):
            remedy = "give the base URL of an OpenAI-compatible server, such as http://localhost:8000/v1"
            raise UserError(f"{self.url_name} = {without_credentials(self.url)!r}", "is no http address", remedy)
        if without_credentials(self.url) != self.url or set(self.url) & set("?#"):
            remedy = f"give the base URL alone, and name the environment variable of the key in {self.key_name}"
            raise UserError(self.url_name, "has a user, a password or parameters", remedy)
        self.read_key()

    def read_key(self) -> str:
        """Return the key of the server, "" for none; an unusable one is refused without being shown."""
        variable = self.key_variable
        key = os.environ.get(variable, "") if variable else ""
        if variable and not key:
            remedy = f"put the key of the server there, or set {self.key_name} to another variable or to nothing"
            raise UserError(f"environment variable {variable}", "is not set", remedy)
        if not re.fullmatch(r"[!-~]*", key):
            remedy = "put the key alone there, without line ends, spaces or quotes around it"
            raise UserError(f"environment variable {variable}", "holds a character that no key has", remedy)
        return key


class OpenAiClient(Generic[Answer]):
    """Posts JSON to one route of a server, several requests at a time.

    A request that fails for a transient reason is retried at growing intervals.

    Args:
        settings: of the server.
        route: behind its base URL, such as "/embeddings".
        parse: turns the body of a response into an answer; ValueError where it is none.
        kind: what an answer is called in messages.
    """

    def __init__(self, settings: ServerSettings, route: str, parse: Callable[[Any, bytes], Answer], kind: str) -> None:
        self.url = settings.url.rstrip("/") + route
        self._settings, self._parse, self._kind, self._key = settings, parse, kind, settings.read_key()
        self._headers = {"Content-Type": "application/json"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._opener = urllib.request.build_opener(_NoRedirects)

    def ask(self, bodies: Sequence[Any]) -> Iterator[tuple[int, Answer]]:
        """Yield (index of the body, answer) for each body, in the order in which answers arrive.

        When a request fails for good, the answers of all finished requests are yielded before the failure is raised.

        Raises:
            UserError: the server refuses a request.
            TransientError: a request still fails after the last attempt.
        """
        with ThreadPoolExecutor(self._settings.requests) as pool:
            indices = {pool.submit(self._answer, body): index for index, body in enumerate(bodies)}
            failure = None
            try:
                for future in as_completed(indices):
                    if future.cancelled():
                        continue
                    failure = failure or future.exception()
                    if future.exception() is None:
                        yield indices[future], future.result()
                    else:  # requests in flight continue, so that their answers are saved; the waiting ones are cancelled
                        for other in indices:
                            other.cancel()
            finally:
                pool.shutdown(cancel_futures=True)
            if failure is not None:
                raise failure

    def _answer(self, body: Any) -> Answer:
        """Return the answer to one body; UserError where the server refuses, TransientError after the last attempt."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                return self._parse(body, self._post(body))
            except urllib.error.HTTPError as error:
                failure = f"answers {error.code}: {self._reason(error)}"
                if error.code not in RETRIED_STATUS_CODES:
                    raise UserError(self.url, failure, self._settings.remedy) from None
            except (OSError, http.client.HTTPException) as error:  # refused, reset, cut short or timed out
                failure = f"does not answer: {error}"
            except ValueError as error:
                failure = f"answers what is no {self._kind}: {error}"
        raise TransientError(self.url, failure, "rerun when it does: finished work is kept")

    def _post(self, body: Any) -> bytes:
        request = urllib.request.Request(self.url, dump_json(body, self.url).encode(), self._headers)
        with self._opener.open(request, timeout=self._settings.timeout_seconds) as response:
            return bytes(response.read())

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """Return the beginning of the body of an error response, without the key."""
        if error.code in REDIRECTIONS:
            return "a redirection, which is not followed, since the other server would get the key"
        try:
            body = error.read(4000).decode(errors="replace")
        except OSError:
            body = ""
        body = body.replace(self._key, "(key)") if self._key else body  # before it is cut: half a key is one, too
        return " ".join(body.split())[:200] or str(error.reason)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: another host would get the key, and its answer would count as the server's."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse to make the request of a redirection."""
