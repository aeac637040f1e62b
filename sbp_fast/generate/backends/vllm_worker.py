"""Draws documents with vLLM: a script for the Python of vLLM's environment, which need not have anything of this project.

    python vllm_worker.py              says which vLLM it would draw with
    python vllm_worker.py DIRECTORY    draws what is asked for there

It follows the interface of vLLM 0.33. Every file appears under its name when it is whole:

    request.json        engine: arguments of vllm.LLM; sampling: see `parameters`
    seeds-00000.npz     tokens int32, prompts one after the other, and lengths int64 of them; for each document place int64,
                        of its prompt among them, and random_seed int64
    end.json            how many files of seeds there are, once that is known
    drafts-00000.npz    tokens int32 of the documents one after the other, the end token included, nats float32 of each, and
                        for each document, in the order of the seeds' file, lengths int64 and reason, vLLM's finish_reason

It is over when all is drawn, or when its standard input closes because whoever started it is gone.
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
    sys.path.pop(0)  # the modules beside this file are none of vLLM's

import numpy as np
import vllm
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, SamplingParams

PAUSE_SECONDS = 0.05


def work(directory: Path) -> None:
    """Answer each file of seeds by one of drafts."""
    threading.Thread(target=leave_when_alone, daemon=True).start()
    request = json.loads((directory / "request.json").read_text())
    engine = vllm.LLM(**request["engine"])
    number = 0
    while (seeds := wait_for_seeds(directory, number)) is not None:
        save(directory / f"drafts-{number:05d}.npz", draw(engine, request["sampling"], seeds))
        number += 1


def leave_when_alone() -> None:
    """End with whoever started this, whatever vLLM is at."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def wait_for_seeds(directory: Path, number: int) -> dict[str, np.ndarray] | None:
    """The next file of seeds; None if there is none to come."""
    path, end = directory / f"seeds-{number:05d}.npz", directory / "end.json"
    while not path.is_file():
        if end.is_file() and json.loads(end.read_text()) <= number:
            return None
        time.sleep(PAUSE_SECONDS)
    with np.load(path) as file:
        return dict(file)


def draw(engine: Any, sampling: dict[str, Any], seeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The documents of a file of seeds, each a request of its own, as a seed of random numbers is a request's."""
    tokens = np.split(seeds["tokens"], np.cumsum(seeds["lengths"])[:-1])
    prompts = [{"prompt_token_ids": tokens[place].tolist()} for place in seeds["place"]]
    rules = [parameters(sampling, int(random_seed)) for random_seed in seeds["random_seed"]]
    drawn = [request.outputs[0] for request in engine.generate(prompts, rules, use_tqdm=False)]
    nats = [step[token].logprob for one in drawn for token, step in zip(one.token_ids, one.logprobs, strict=True)]
    return {
        "tokens": np.array([token for one in drawn for token in one.token_ids], np.int32),
        "nats": np.array(nats, np.float32),
        "lengths": np.array([len(one.token_ids) for one in drawn], np.int64),
        "reason": np.array([str(one.finish_reason) for one in drawn]),
    }


def parameters(sampling: dict[str, Any], random_seed: int) -> SamplingParams:
    """How one document is drawn; without a tokenizer a token can be forbidden by its logit alone."""
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
        logprobs=0,  # of the drawn tokens alone
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(temporary, path)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(vllm.__version__)
    else:
        work(Path(sys.argv[1]))
