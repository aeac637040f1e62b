"""Language models as judges: an OpenAI-compatible endpoint, or a Hugging Face directory on this machine."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from sbp_fast.config import QualityConfig
from sbp_fast.errors import TransientError, UserError
from sbp_fast.pipeline.credentials import without_credentials
from sbp_fast.pipeline.files import dump_json, hash_file, hash_value, parse_json

ANSWER_TOKENS = 1024  # limit for a server's model, which may reason before it answers
VERDICT_TOKENS = 16  # limit for a local model, which may not stop by itself
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0  # doubled after each attempt
REDIRECTIONS = range(300, 400)
RETRIED_STATUS_CODES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class Judge(Protocol):
    """A model that answers prompts.

    Attributes:
        identity: description of the model for the manifest, JSON-representable.
    """

    identity: dict[str, Any]

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield (index of the prompt, answer) for each prompt, in the order in which answers arrive."""
        ...


def check_judge(config: QualityConfig) -> None:
    """Refuse unusable settings of a judge, without sending a request or loading a model.

    Raises:
        UserError: a setting is missing or wrong, or the key is not set.
    """
    if config.judge == "none":
        return
    if not config.judge_model:
        raise UserError("quality.judge_model", "is not set", f'name the model of the judge, which is "{config.judge}"')
    if config.judge == "local":
        if not Path(config.judge_model).is_dir():
            raise UserError(f"quality.judge_model = {config.judge_model}", "is no directory", "give a Hugging Face directory")
        return
    if urlsplit(config.judge_url).scheme not in ("http", "https"):
        remedy = "give the base URL of an OpenAI-compatible server, such as http://localhost:8000/v1"
        raise UserError(f"quality.judge_url = {without_credentials(config.judge_url)!r}", "is no http address", remedy)
    if without_credentials(config.judge_url) != config.judge_url or set(config.judge_url) & set("?#"):
        remedy = "give the base URL alone, and name the environment variable of the key in quality.judge_key_variable"
        raise UserError("quality.judge_url", "has a user, a password or parameters", remedy)
    _read_key(config)


def _read_key(config: QualityConfig) -> str:
    """Return the key of an endpoint, "" for none; an unusable one is refused without being shown."""
    variable = config.judge_key_variable
    key = os.environ.get(variable, "") if variable else ""
    if variable and not key:
        remedy = "put the key of the judge there, or set quality.judge_key_variable to another variable or to nothing"
        raise UserError(f"environment variable {variable}", "is not set", remedy)
    if not re.fullmatch(r"[!-~]*", key):
        remedy = "put the key alone there, without line ends, spaces or quotes around it"
        raise UserError(f"environment variable {variable}", "holds a character that no key has", remedy)
    return key


def open_judge(config: QualityConfig, device: str) -> Judge | None:
    """Return the judge that the configuration asks for; None for "none".

    Raises:
        UserError: `check_judge` refuses the settings, or the model cannot be loaded.
    """
    check_judge(config)
    if config.judge == "none":
        return None
    return Endpoint(config) if config.judge == "endpoint" else LocalModel(config.judge_model, device)


class Endpoint:
    """A model behind `POST URL/chat/completions`, asked for its most likely answer.

    Several requests are in flight at a time. A request that fails for a transient reason is retried at growing intervals.
    When one fails for good, the answers of all finished requests are yielded before the failure is raised.
    """

    def __init__(self, config: QualityConfig) -> None:
        self._url = config.judge_url.rstrip("/") + "/chat/completions"
        self._config, self._headers, self._key = config, {"Content-Type": "application/json"}, _read_key(config)
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._opener = urllib.request.build_opener(_NoRedirects)
        url = without_credentials(config.judge_url)
        self.identity = {"kind": "endpoint", "model": config.judge_model, "url": url, "temperature": 0}

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield (index of the prompt, answer) for each prompt, in the order in which answers arrive.

        Raises:
            UserError: the server refuses a request.
            TransientError: a request still fails after the last attempt.
        """
        with ThreadPoolExecutor(self._config.judge_requests) as pool:
            indices = {pool.submit(self._answer, prompt): index for index, prompt in enumerate(prompts)}
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

    def _answer(self, prompt: str) -> str:
        """Return the answer to one prompt; UserError where the server refuses, TransientError after the last attempt."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                return _content(self._post(prompt))
            except urllib.error.HTTPError as error:
                failure = f"answers {error.code}: {self._reason(error)}"
                if error.code not in RETRIED_STATUS_CODES:
                    remedy = "correct quality.judge_url, judge_model or the key"
                    raise UserError(self._url, failure, remedy) from None
            except (OSError, http.client.HTTPException) as error:  # refused, reset, cut short or timed out
                failure = f"does not answer: {error}"
            except ValueError as error:
                failure = f"answers what is no chat completion: {error}"
        raise TransientError(self._url, failure, "rerun when it does: what was answered so far is kept")

    def _post(self, prompt: str) -> bytes:
        body = {
            "model": self._config.judge_model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
        }
        request = urllib.request.Request(self._url, dump_json(body, self._url).encode(), self._headers)
        with self._opener.open(request, timeout=self._config.judge_timeout_seconds) as response:
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
    """A redirection is an error: another host would get the key, and its answer would count as the judge's."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse to make the request of a redirection."""


def _content(response: bytes) -> str:
    """Return the text of a chat completion; ValueError if the response is none."""
    answer = parse_json(response)
    try:
        content = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        raise ValueError(response[:80].decode(errors="replace")) from None
    return content if isinstance(content, str) else ""


class LocalModel:
    """A causal language model of transformers, asked for its most likely answer.

    Args:
        directory: a Hugging Face directory on this machine; if it has a chat template, prompts are sent as a user's message.
        device: torch device of the model.

    Raises:
        UserError: transformers cannot load it.
    """

    def __init__(self, directory: str, device: str) -> None:
        try:
            self._model, self._tokenizer = _load(directory, device)
        except (OSError, ValueError, KeyError) as error:
            problem = f"cannot be loaded: {str(error).splitlines()[0]}"
            raise UserError(
                f"quality.judge_model = {directory}", problem, "give a directory that transformers can load"
            ) from None
        self.identity = {"kind": "local", "model": Path(directory).name, "files": fingerprint_directory(directory)}

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield (index of the prompt, answer) for each prompt, in order."""
        for index, prompt in enumerate(prompts):
            yield index, self._answer(prompt)

    def _answer(self, prompt: str) -> str:
        if getattr(self._tokenizer, "chat_template", None):
            message = [{"role": "user", "content": prompt}]
            prompt = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        inputs = self._tokenizer(prompt, return_tensors="pt").to(self._model.device)
        tokens = self._model.generate(**inputs, do_sample=False, max_new_tokens=VERDICT_TOKENS)
        return str(self._tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def fingerprint_directory(directory: str) -> str:
    """Return the hash of the names and contents of the files in a folder."""
    files = sorted(path for path in Path(directory).iterdir() if path.is_file())
    return hash_value([[path.name, hash_file(path)] for path in files])


def _load(directory: str, device: str) -> tuple[Any, Any]:
    # The import takes seconds, which a run without a judge should not spend.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusted = {"local_files_only": True, "trust_remote_code": False}  # or transformers would ask at the keyboard
    model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype="auto", **trusted)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(directory, **trusted)
