"""Sampling of a token from each row of 16-bit logits, beside plain torch and the filters of transformers; on CUDA alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sbp_kernels import sample_tokens
from torch import Tensor

from bench import machine
from bench.case import Case, Prepared, Provider, Tensors, no_results

ROWS = 512
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float16
VOCABULARIES = (49_152, 151_936)  # of the 3B model and of Qwen3
RULES: dict[str, dict[str, Any]] = {"top_p 0.9": {"top_p": 0.9}, "top_k 50": {"top_k": 50}, "uncut": {}}
FEW = 0.005  # share of rows whose uniform may fall between the roundings of a running sum

Sample = Callable[[Tensor, Tensor], Tensor]
"""Logits [B, V] and uniforms [B] -> tokens [B]."""


def sampling() -> Iterator[Case]:
    """Each vocabulary and rule."""
    if machine.tiny():
        yield _case(4, 64, "top_p 0.9")
    elif torch.cuda.is_available():
        for rule in RULES:
            for vocabulary in VOCABULARIES:
                yield _case(ROWS, vocabulary, rule)


def _case(rows: int, vocabulary: int, rule: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        options: dict[str, Any] = {"device": machine.device(), "generator": generator}
        logits = (3 * torch.randn(rows, vocabulary, **options)).to(DTYPE)
        return {"logits": logits, "uniforms": torch.rand(rows, dtype=torch.float64, **options)}

    def verify() -> dict[str, Any]:
        tensors = inputs(torch.Generator(machine.device()).manual_seed(0))
        exact = _by(rule, "torch")(tensors["logits"].double(), tensors["uniforms"])
        error = float((_by(rule, "triton")(tensors["logits"], tensors["uniforms"]) != exact).double().mean())
        return {"right": error <= FEW, "errors": {"share of other tokens": error}}

    samplers = {"ours": _by(rule, "triton"), "torch": _by(rule, "torch"), "transformers' filters": _by_filters(rule)}
    return Case(
        {"operation": "sampling", "rows": rows, "vocabulary": vocabulary, "rule": rule},
        inputs,
        {name: _provider(sample) for name, sample in samplers.items()},
        None,
        work=rows,
        unit="tokens",
        bytes=2.0 * rows * vocabulary,
        verify=verify,
    )


def _by(rule: str, backend: str) -> Sample:
    return lambda logits, uniforms: sample_tokens(logits, uniforms, temperature=1.0, backend=backend, **RULES[rule])[0]


def _by_filters(rule: str) -> Sample:
    """Cut by transformers and sample by torch, from random numbers of its own."""

    def sample(logits: Tensor, _: Tensor) -> Tensor:
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        filters = {"top_p": TopPLogitsWarper, "top_k": TopKLogitsWarper}
        ids = torch.empty(len(logits), 0, dtype=torch.int64, device=logits.device)
        for name, value in RULES[rule].items():
            logits = filters[name](value)(ids, logits)
        return torch.multinomial(logits.softmax(-1), 1).squeeze(1)

    return sample


def _provider(sample: Sample) -> Provider:
    return lambda tensors: Prepared(lambda: sample(tensors["logits"], tensors["uniforms"]), no_results)
