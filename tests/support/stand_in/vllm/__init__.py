"""A stand-in for the part of vLLM 0.33 that `vllm_worker.py` uses: the same names, arguments and shapes of outputs.

It samples a few tokens at random, by the request's own seed, and ends documents as vLLM's scheduler does. Environment variables
make it misbehave: STAND_IN_DIES (after so many documents) and STAND_IN_TOKEN (this token always). STAND_IN_LOG names a file for
what it was called with.
"""

import json
import math
import os
import random
import sys
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

__version__ = "0.33.0+stand.in"


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    logprobs: list[dict[int, Logprob]]
    finish_reason: str
    stop_reason: int | str | None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        hf_overrides: dict[str, Any] | None = None,
        max_model_len: int | None = None,
        kv_cache_dtype: str = "auto",
        kv_cache_memory_bytes: int | None = None,
        max_num_seqs: int | None = None,
        enable_prefix_caching: bool | None = None,
        logprobs_mode: str = "raw_logprobs",
        enable_chunked_prefill: bool | None = None,
        max_num_batched_tokens: int | None = None,
    ) -> None:
        with open(f"{model}/config.json") as file:
            description = {**json.load(file), **(hf_overrides or {})}
        limit = description["max_position_embeddings"]
        if max_model_len is not None and max_model_len > limit:
            raise ValueError(f"User-specified max_model_len ({max_model_len}) is greater than the derived one ({limit})")
        assert skip_tokenizer_init and logprobs_mode == "raw_logprobs" and dtype in ("float32", "bfloat16")
        self.longest, self.vocabulary_size, self.done = max_model_len or limit, description["vocab_size"], 0
        if enable_chunked_prefill is False and (max_num_batched_tokens or 2048) < max(self.longest, max_num_seqs or 256):
            raise ValueError(f"max_num_batched_tokens ({max_num_batched_tokens}) is smaller than max_model_len or max_num_seqs")
        self.offsets_fail = os.environ.get("CUDA_VISIBLE_DEVICES") == "" and enable_chunked_prefill is not False
        modules = sorted(name for name in ("torch", "sbp_fast") if name in sys.modules)
        settings = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "max_num_seqs": max_num_seqs}
        settings["kv_cache_memory_bytes"] = kv_cache_memory_bytes
        settings |= {"enable_chunked_prefill": enable_chunked_prefill, "max_num_batched_tokens": max_num_batched_tokens}
        note(engine=settings, modules=modules, environment=dict(os.environ), path=sys.path)

    def generate(self, prompts: list[dict[str, list[int]]], sampling_params: list[SamplingParams], *, use_tqdm: bool = True):
        assert len(prompts) == len(sampling_params)
        return [self._generate(prompt["prompt_token_ids"], one) for prompt, one in zip(prompts, sampling_params, strict=True)]

    def _generate(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        self.done += 1
        if self.done > int(os.environ.get("STAND_IN_DIES", "1000000")):
            print("some lines before", file=sys.stderr)
            raise RuntimeError("CUDA out of memory, or so")
        if self.offsets_fail and params.seed is not None and params.temperature:
            raise RuntimeError("CPU Generator does not use offset")
        assert all(type(token) is int and 0 <= token < self.vocabulary_size for token in prompt)
        assert len(prompt) < self.longest
        assert params.logprobs == 0 and params.output_kind == RequestOutputKind.FINAL_ONLY and not params.detokenize
        note(seed=params.seed, prompt=prompt)
        dice, tokens, reason = random.Random(params.seed), [], ""
        forbidden = {token for token, bias in params.logit_bias.items() if bias == -math.inf}
        words = [token for token in range(dice.choice((6, 200))) if token not in {*forbidden, *params.stop_token_ids}]
        while not reason:
            sampled = dice.choice(words if dice.random() < 0.95 else params.stop_token_ids)
            tokens.append(int(os.environ.get("STAND_IN_TOKEN", sampled)))
            reason = stop_of(tokens, len(prompt), params, self.longest)
        nats = [nats_of(token) for token in tokens]
        logprobs = [{token: Logprob(one, 1)} for token, one in zip(tokens, nats, strict=True)]
        output = CompletionOutput(0, "", tokens, sum(nats), logprobs, reason, None)
        return RequestOutput(str(self.done), prompt, [output])


def nats_of(token: int) -> float:
    return -1.0 / (1 + token)


def stop_of(tokens: list[int], prompt: int, params: SamplingParams, longest: int) -> str:
    """As `check_stop` of vLLM's scheduler."""
    if tokens[-1] in params.stop_token_ids:
        return "stop"
    if prompt + len(tokens) >= longest or len(tokens) >= params.max_tokens:
        return "length"
    rule = params.repetition_detection
    for width in range(rule.min_pattern_size, rule.max_pattern_size + 1) if rule else ():
        if width * rule.min_count > len(tokens):
            return ""
        runs = [tokens[len(tokens) - width * (back + 1) : len(tokens) - width * back] for back in range(rule.min_count)]
        if all(run == runs[0] for run in runs):
            return "repetition"
    return ""


def note(**values: Any) -> None:
    if "STAND_IN_LOG" in os.environ:
        with open(os.environ["STAND_IN_LOG"], "a") as file:
            file.write(json.dumps(values) + "\n")
