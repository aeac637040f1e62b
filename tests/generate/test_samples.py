"""Documents for people to read, some of them without a seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sbp_kernels import PackedLayout
from tiny_generation import BEGIN, END, RUN_SEED, SAMPLING, VOCABULARY, packed_logits, small_model

from sbp_fast.generate.rng import document_uniforms
from sbp_fast.generate.samples import generate_samples

LENGTH = 64


def logits_after(model: torch.nn.Module, seed: np.ndarray, child: list[int]) -> np.ndarray:
    """Logits of the next token, everything computed anew."""
    if len(seed):
        return packed_logits(model, seed, child)[-1].double().numpy()
    with torch.inference_mode():
        return model.logits(model(torch.tensor(child), PackedLayout.from_lengths([len(child)])))[-1].double().numpy()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_are_those_of_the_definition_with_and_without_seeds(temperature: float) -> None:
    model, generator = small_model(), np.random.default_rng(0)
    sampling = replace(SAMPLING, first=BEGIN, temperature=temperature, top_p=1.0, maximum_tokens=LENGTH)
    none = np.zeros(0, np.int64)
    seeds = {5: none, 9: generator.integers(3, VOCABULARY, 20), 2: none, 7: generator.integers(3, VOCABULARY, 1)}
    results = generate_samples(model, sampling, seeds, RUN_SEED)
    assert [result.seed for result in results] == [0, 1, 2, 3]
    for (document, seed), result in zip(seeds.items(), results, strict=True):
        child = [BEGIN]
        for uniform in document_uniforms(RUN_SEED, document, 0, LENGTH):
            logits = logits_after(model, seed, child)
            logits[list(sampling.forbidden)] = -np.inf
            weights = np.exp(logits - logits.max())
            likeliest = int(logits.argmax())
            sampled = int(np.searchsorted(np.cumsum(weights / weights.sum()), uniform, "right"))
            child.append(sampled if temperature else likeliest)
            if child[-1] == END:
                break
        assert result.tokens.tolist() == child[1 : -1 if child[-1] == END else None]
        assert len(result.tokens) <= LENGTH and result.stop == ("end" if child[-1] == END else "length")
    if temperature:
        assert results[0].tokens.tolist() != results[2].tokens.tolist()
