"""Greedy continuations of prompts, against the model's own forward pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sbp_kernels import PackedLayout
from tiny_generation import BEGIN, END, PARTNER, SAMPLING, VOCABULARY, small_model

from sbp_fast.generate import continuations
from sbp_fast.generate.continuations import continue_prompts

GREEDY = replace(SAMPLING, temperature=0.0, top_p=1.0, maximum_tokens=6)


def most_probable(model: torch.nn.Module, prompt: np.ndarray) -> list[int]:
    tokens = prompt.tolist()
    while len(tokens) < len(prompt) + GREEDY.maximum_tokens:
        with torch.inference_mode():
            layout = PackedLayout.from_lengths([len(tokens)])
            logits = model.logits(model(torch.tensor(tokens), layout))[-1].clone()
            logits[[BEGIN, PARTNER]] = -torch.inf
            tokens.append(int(logits.argmax()))
        if tokens[-1] == END:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def test_continuations_are_the_most_probable_tokens_after_prompts_of_any_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, random = small_model(), np.random.default_rng(0)
    prompts = [random.integers(3, VOCABULARY, length) for length in random.integers(2, 30, 40)]
    assert len({int(prompt[-1]) for prompt in prompts}) > 10
    monkeypatch.setattr(continuations, "ROWS", 16)
    advanced: list[int] = []
    results = continue_prompts(model, prompts, GREEDY, advanced.append)
    assert [result.tokens.tolist() for result in results] == [most_probable(model, prompt) for prompt in prompts]
    assert sum(advanced) == sum(len(prompt) + result.generated_tokens for prompt, result in zip(prompts, results, strict=True))
    alone = continue_prompts(model, prompts[7:8], GREEDY, advanced.append)
    assert alone[0].tokens.tolist() == results[7].tokens.tolist()


def test_continuations_at_another_temperature_are_refused() -> None:
    with pytest.raises(ValueError, match="continuations are greedy"):
        continue_prompts(small_model(), [np.array([4, 5])], SAMPLING, lambda tokens: None)
