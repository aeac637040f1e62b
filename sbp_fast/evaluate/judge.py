"""Language models as judges: an OpenAI-compatible endpoint, or a Hugging Face directory on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from sbp_fast.config import QualityConfig
from sbp_fast.errors import UserError
from sbp_fast.pipeline.credentials import without_credentials
from sbp_fast.pipeline.files import hash_file, hash_value, parse_json
from sbp_fast.pipeline.openai_client import OpenAiClient, ServerSettings

ANSWER_TOKENS = 1024  # limit for a server's model, which may reason before it answers
VERDICT_TOKENS = 16  # limit for a local model, which may not stop by itself


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
    _server(config).check()


def _server(config: QualityConfig) -> ServerSettings:
    return ServerSettings(
        url=config.judge_url,
        key_variable=config.judge_key_variable,
        requests=config.judge_requests,
        timeout_seconds=config.judge_timeout_seconds,
        url_name="quality.judge_url",
        key_name="quality.judge_key_variable",
        remedy="correct quality.judge_url, judge_model or the key",
    )


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
    """A model behind `POST URL/chat/completions`, asked for its most likely answer (see `OpenAiClient`)."""

    def __init__(self, config: QualityConfig) -> None:
        self._config, self._client = config, OpenAiClient(_server(config), "/chat/completions", _content, "chat completion")
        url = without_credentials(config.judge_url)
        self.identity = {"kind": "endpoint", "model": config.judge_model, "url": url, "temperature": 0}

    def ask(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield (index of the prompt, answer) for each prompt, in the order in which answers arrive.

        Raises:
            UserError: the server refuses a request.
            TransientError: a request still fails after the last attempt.
        """
        return self._client.ask([self._body(prompt) for prompt in prompts])

    def _body(self, prompt: str) -> dict[str, Any]:
        return {
            "model": self._config.judge_model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": ANSWER_TOKENS,
        }


def _content(body: dict[str, Any], response: bytes) -> str:
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
