"""Language models as judges: an OpenAI-compatible endpoint, or a Hugging Face directory on this machine."""

from __future__ import annotations

import http.client
import json
import os
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
from sbp_fast.pipeline.files import hash_file, hash_value

ANSWER_TOKENS = 1024  # of a server's model, which may think before it answers
VERDICT_TOKENS = 16  # of a local one, which may not stop by itself
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0  # twice as long after each attempt
TRIED_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class Judge(Protocol):
    """Answers prompts.

    Attributes:
        identity: what the verdicts come from, JSON-representable, for the manifest.
    """

    identity: dict[str, Any]

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """The number of each prompt and its answer, as they come."""
        ...


def check_judge(config: QualityConfig) -> None:
    """Refuse settings of a judge that are of no use, without asking it or loading anything.

    Raises:
        UserError: settings that are missing or wrong, a key that is not set.
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
        raise UserError(f"quality.judge_url = {config.judge_url!r}", "is no http address", remedy)
    variable = config.judge_key_variable
    if variable and not os.environ.get(variable):
        remedy = "put the key of the judge there, or set quality.judge_key_variable to another variable or to nothing"
        raise UserError(f"environment variable {variable}", "is not set", remedy)


def open_judge(config: QualityConfig, device: str) -> Judge | None:
    """The judge that the configuration asks for; None for "none".

    Raises:
        UserError: what `check_judge` refuses, a model that cannot be loaded.
    """
    check_judge(config)
    if config.judge == "none":
        return None
    return Endpoint(config) if config.judge == "endpoint" else LocalModel(config.judge_model, device)


class Endpoint:
    """A model behind `POST URL/chat/completions`, asked for its most likely answer.

    What is answered is yielded before a failure is raised. Several questions are under way at a time; one that fails for a
    reason that may pass is asked again, at growing intervals.
    """

    def __init__(self, config: QualityConfig) -> None:
        self._url = config.judge_url.rstrip("/") + "/chat/completions"
        self._config, self._headers = config, {"Content-Type": "application/json"}
        if config.judge_key_variable:
            self._headers["Authorization"] = f"Bearer {os.environ[config.judge_key_variable]}"
        self.identity = {"kind": "endpoint", "model": config.judge_model, "url": config.judge_url, "temperature": 0}

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        with ThreadPoolExecutor(self._config.judge_requests) as pool:
            asked = {pool.submit(self._answer, prompt): number for number, prompt in enumerate(prompts)}
            failure = None
            try:
                for answered in as_completed(asked):
                    if answered.cancelled():
                        continue
                    failure = failure or answered.exception()
                    if answered.exception() is None:
                        yield asked[answered], answered.result()
                    else:  # those under way may still be answered, and what is answered is to be kept
                        for other in asked:
                            other.cancel()
            finally:
                pool.shutdown(cancel_futures=True)
            if failure is not None:
                raise failure

    def _answer(self, prompt: str) -> str:
        """Raises UserError where the server refuses, TransientError where it goes on failing."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                return _content(self._post(prompt))
            except urllib.error.HTTPError as error:
                failure = f"answers {error.code}: {_reason(error)}"
                if error.code not in TRIED_AGAIN:
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
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=self._config.judge_timeout_seconds) as response:
            return bytes(response.read())


def _reason(error: urllib.error.HTTPError) -> str:
    """The start of what a server said as it refused."""
    try:
        said = error.read(400).decode(errors="replace")
    except OSError:
        said = ""
    return " ".join(said.split())[:200] or str(error.reason)


def _content(response: bytes) -> str:
    """The text of a chat completion; ValueError if it is none."""
    answer = json.loads(response)
    try:
        content = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        raise ValueError(response[:80].decode(errors="replace")) from None
    return content if isinstance(content, str) else ""


class LocalModel:
    """A causal language model of transformers, asked for its most likely answer.

    Args:
        directory: a Hugging Face directory on this machine; with a chat template prompts are put as a user's message.

    Raises:
        UserError: nothing in it that transformers can load.
    """

    def __init__(self, directory: str, device: str) -> None:
        try:
            self._model, self._tokenizer = _load(directory, device)
        except (OSError, ValueError, KeyError) as error:
            said = f"cannot be loaded: {str(error).splitlines()[0]}"
            raise UserError(f"quality.judge_model = {directory}", said, "give a directory that transformers can load") from None
        self.identity = {"kind": "local", "model": Path(directory).name, "files": fingerprint_directory(directory)}

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        for number, prompt in enumerate(prompts):
            yield number, self._answer(prompt)

    def _answer(self, prompt: str) -> str:
        if getattr(self._tokenizer, "chat_template", None):
            message = [{"role": "user", "content": prompt}]
            prompt = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        inputs = self._tokenizer(prompt, return_tensors="pt").to(self._model.device)
        written = self._model.generate(**inputs, do_sample=False, max_new_tokens=VERDICT_TOKENS)
        return str(self._tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def fingerprint_directory(directory: str) -> str:
    """Hash of the names and contents of the files in a folder."""
    files = sorted(path for path in Path(directory).iterdir() if path.is_file())
    return hash_value([[path.name, hash_file(path)] for path in files])


def _load(directory: str, device: str) -> tuple[Any, Any]:
    # The import takes seconds, which a run without a judge should not spend.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, torch_dtype="auto")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True)
