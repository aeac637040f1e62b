"""Documents drawn by vLLM, which pins its own torch: by a worker in an environment of its own, with files in and files out.

`vllm_worker.py` says what is in the files, and which vLLM's interface it follows. It has been run against a stand-in for that
interface, not yet against vLLM itself. A document has its own seed of random numbers, so that it comes out the same again as
far as vLLM's arithmetic does not depend on what is drawn together; vLLM does not promise that.

Prompts are token ids, and the samples of a seed follow each other, so that vLLM's prefix cache serves all but the first. Each
file of seeds is one call of `LLM.generate`, near whose end fewer and fewer documents are at work; documents of a file that a
kill interrupts are drawn again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbp_fast.config import RunConfig, SynthesizeConfig
from sbp_fast.errors import UserError
from sbp_fast.generate.backends.backend import Drawers, model_precision
from sbp_fast.generate.backends.stop_rules import make_draft
from sbp_fast.generate.decoder import SamplingRule
from sbp_fast.generate.engine import Draft, Seed
from sbp_fast.generate.rng import document_seed
from sbp_fast.pipeline.files import atomic_open, write_json

WORKER = Path(__file__).with_name("vllm_worker.py")
FILE_DOCUMENTS = 4096
AHEAD = 2
"""Files of seeds that lie ready, so that the worker does not wait for the next one."""
PAUSE_SECONDS, LEAVE_SECONDS = 0.05, 30.0
LOG_LINES = 5
KNOWN_VERSION = "0.33.0"
HOTTEST, COLDEST = 2.0, 0.01
"""vLLM refuses temperatures above the one, and takes those between 0 and the other for the other."""


def check_vllm(settings: SynthesizeConfig, device: torch.device) -> str:
    """The version of vLLM in the environment of `synthesize.vllm_python`.

    Raises:
        UserError: no such environment, or a setting that vLLM has not.
    """
    if settings.temperature > HOTTEST or 0 < settings.temperature < COLDEST:
        known = f"is none of vLLM's, which are 0 and {COLDEST} to {HOTTEST}"
        raise UserError(f"synthesize.temperature = {settings.temperature}", known, "choose one of these, or another backend")
    cache_type(settings.cache_precision, model_precision(settings, device))
    if not settings.vllm_python:
        what = 'is not set, and backend = "vllm" needs the Python of an environment that has vLLM'
        remedy = "make one (python -m venv vllm; vllm/bin/pip install vllm) and set it to vllm/bin/python"
        raise UserError("synthesize.vllm_python", what, remedy)
    return vllm_version(settings.vllm_python)


@cache
def vllm_version(python: str) -> str:
    """What vLLM's worker says with this Python, which takes seconds to import it."""
    where = f"synthesize.vllm_python = {python}"
    command = [_path_of(python), str(WORKER)]
    try:
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
    except OSError as error:
        raise UserError(where, f"cannot be run: {error.strerror}", "name the Python of an environment that has vLLM") from None
    if done.returncode or not done.stdout.strip():
        said = f"cannot use vLLM: {_last_lines(done.stderr, 1)}"
        raise UserError(where, said, f"install vLLM there: {python} -m pip install vllm=={KNOWN_VERSION}")
    return done.stdout.split()[-1]


def open_vllm(
    config: RunConfig, exported: Path, rule: SamplingRule, context: int, directory: Path, device: torch.device
) -> Drawers:
    """A worker for this process, on its device."""
    settings = config.synthesize
    version, precision = check_vllm(settings, device), model_precision(settings, device)
    longest = context + 1 + rule.maximum_tokens
    engine = {
        "model": str(exported.resolve()),
        "skip_tokenizer_init": True,
        "dtype": precision,
        "kv_cache_dtype": cache_type(settings.cache_precision, precision),
        # vLLM ends a document when this is reached, the last token of which needs no position: one more than the model has
        "max_model_len": longest,
        "hf_overrides": {"max_position_embeddings": longest},
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
    }
    if settings.batch_documents != "auto":
        engine["max_num_seqs"] = settings.batch_documents
    if settings.cache_gib:
        engine["kv_cache_memory_bytes"] = int(settings.cache_gib * 2**30)
    request = {"engine": engine, "sampling": sampling(rule)}
    drawer = VllmDrawer(_path_of(settings.vllm_python), directory, request, rule, config.seed, device)
    facts = {"precision": precision, "vllm": version, "batch_documents": settings.batch_documents}
    return Drawers([drawer], 1, facts, {"vllm": version})


def cache_type(cache_precision: str, precision: str) -> str:
    """vLLM's name of what keys and values are kept in."""
    if cache_precision in ("auto", precision):
        return "auto"
    if cache_precision == "float32":
        what = f"with precision = {precision}: vLLM has no such cache"
        raise UserError("synthesize.cache_precision = float32", what, "choose auto, bfloat16 or float8, or another backend")
    return {"float8": "fp8"}.get(cache_precision, cache_precision)


def sampling(rule: SamplingRule) -> dict[str, Any]:
    """What `vllm_worker.parameters` makes a request of.

    vLLM ends a document when a run of tokens follows itself, which saves drawing on in a loop. Of runs this long our own rule
    has ended the document before or with it, so that cutting the documents by that rule makes them what they are meant to be.
    """
    width = rule.repeated_tokens
    return {
        "temperature": rule.temperature,
        "top_p": rule.top_p,
        "top_k": rule.top_k,
        "maximum_tokens": rule.maximum_tokens,
        "end": rule.end,
        "forbidden": list(rule.forbidden),
        "repetition": {"min_pattern_size": width, "max_pattern_size": 2 * width, "min_count": 2} if width else None,
    }


class VllmDrawer:
    """Draws by a worker that runs while `draw` does."""

    def __init__(
        self, python: str, directory: Path, request: dict[str, Any], rule: SamplingRule, run_seed: int, device: torch.device
    ) -> None:
        self.python, self.directory, self.request, self.rule, self.run_seed = python, directory, request, rule, run_seed
        self.device = device

    def draw(self, seeds: Iterable[Seed]) -> Iterator[Draft]:
        """Every sample of every seed."""
        files: Iterator[tuple[int, list[Seed]]] = enumerate(_files(seeds))
        first = next(files, None)
        if first is None:
            return
        files = chain([first], files)
        asked: list[list[Seed]] = []
        answered = 0
        with _Worker(self.python, self.directory, self.request, self.device) as worker:
            while True:
                while len(asked) < answered + AHEAD and (newest := next(files, None)) is not None:
                    number, group = newest
                    worker.ask(number, self._prompts(group))
                    asked.append(group)
                if answered == len(asked):
                    worker.end(answered)
                    return
                yield from self._drafts(asked[answered], worker.answer(answered))
                asked[answered] = []
                answered += 1

    def _prompts(self, seeds: list[Seed]) -> dict[str, np.ndarray]:
        prompts = [np.append(seed.tokens, self.rule.first).astype(np.int32) for seed in seeds]
        documents = [(place, seed.document, sample) for place, seed in enumerate(seeds) for sample in seed.samples]
        return {
            "tokens": np.concatenate(prompts),
            "lengths": np.array([len(prompt) for prompt in prompts], np.int64),
            "place": np.array([place for place, _, _ in documents], np.int64),
            "random_seed": np.array([document_seed(self.run_seed, *one) for _, *one in documents], np.int64),
        }

    def _drafts(self, seeds: list[Seed], found: dict[str, np.ndarray]) -> Iterator[Draft]:
        documents = [(seed.number, sample) for seed in seeds for sample in seed.samples]
        ends = np.cumsum(found["lengths"])[:-1]
        columns = (np.split(found["tokens"], ends), np.split(found["nats"], ends), found["reason"])
        for (seed, sample), drawn, nats, reason in zip(documents, *columns, strict=True):
            draft = make_draft(seed, sample, drawn, nats, self.rule)
            if np.isin(drawn, self.rule.forbidden).any() or (draft.stop == "length" and len(drawn) < self.rule.maximum_tokens):
                what = f"gave a document of {len(drawn)} tokens up for {reason!r}, or drew a token that was forbidden"
                raise UserError("vLLM", what, f"install vLLM {KNOWN_VERSION}, whose interface is known")
            yield draft


def _files(seeds: Iterable[Seed]) -> Iterator[list[Seed]]:
    """Seeds for about FILE_DOCUMENTS documents at a time."""
    group: list[Seed] = []
    documents = 0
    for seed in seeds:
        group.append(seed)
        documents += len(seed.samples)
        if documents >= FILE_DOCUMENTS:
            yield group
            group, documents = [], 0
    if group:
        yield group


class _Worker:
    """The other process, while it is entered. It ends with this one, whatever ends that."""

    def __init__(self, python: str, directory: Path, request: dict[str, Any], device: torch.device) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # what an earlier attempt had asked for
        directory.mkdir(parents=True)
        write_json(directory / "request.json", request)
        self.directory, self.log = directory, directory / "worker.log"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [python, str(WORKER), str(directory)],
                env=_environment(device),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> _Worker:
        return self

    def ask(self, number: int, prompts: dict[str, np.ndarray]) -> None:
        with atomic_open(self._path("seeds", number)) as file:
            np.savez(file, allow_pickle=False, **prompts)

    def answer(self, number: int) -> dict[str, np.ndarray]:
        """The drafts of a file of seeds; both files are gone then.

        Raises:
            UserError: the worker ended before it had drawn them.
        """
        path = self._path("drafts", number)
        while not path.is_file():
            if self._process.poll() is not None and not path.is_file():
                said = _last_lines(self.log.read_text(errors="replace"), LOG_LINES)
                what = f"the worker of vLLM ended with exit code {self._process.returncode}: {said}"
                raise UserError(self.log, what, "mend what it says and rerun: it goes on where it stopped")
            time.sleep(PAUSE_SECONDS)
        with np.load(path) as file:
            found = dict(file)
        self._path("seeds", number).unlink()
        path.unlink()
        return found

    def end(self, files: int) -> None:
        """Let it go: there are so many files of seeds, and all are drawn."""
        write_json(self.directory / "end.json", files)
        with suppress(subprocess.TimeoutExpired):  # all is drawn: what does not go is ended on the way out
            self._process.wait(LEAVE_SECONDS)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _path(self, kind: str, number: int) -> Path:
        return self.directory / f"{kind}-{number:05d}.npz"


def _path_of(python: str) -> str:
    return str(Path(python).expanduser())


def _environment(device: torch.device | None = None) -> dict[str, str]:
    """Variables for the other Python: none that are meant for this one, and this process's device alone.

    Those of torchrun would make torch there wait for a store that is not its own. One process for all of vLLM ends with its
    standard input, and schedules the same way each time.
    """
    ours = ("PYTHON", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_")
    single = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours) and name not in single}
    if device is not None:
        visible = kept.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = device.index or 0
        mine = visible[index] if index < len(visible) and visible[index] else str(index)
        kept["CUDA_VISIBLE_DEVICES"] = mine if device.type == "cuda" else ""
    return {**kept, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _last_lines(text: str, count: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:]) or "it said nothing"
