import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from sbp_fast.synthesize.sampler import document_uniforms, draw_by_sorting, sample


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Exact probabilities, by the definition, in float64."""
    weights = np.exp((logits - logits.max()) / temperature)
    probabilities = weights / weights.sum()
    kept, held = np.zeros(len(logits)), 0.0
    for token in sorted(range(len(logits)), key=lambda token: (-probabilities[token], token)):
        if held >= top_p:
            break
        kept[token] = probabilities[token]
        held += probabilities[token]
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.6, 0.9), (1.0, 0.9), (1.0, 0.35)])
def test_draws_follow_the_exact_probabilities(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(0, 2, 40).astype(np.float32)
    draws = 50_000
    uniforms = torch.from_numpy(np.random.default_rng(1).random(draws))
    drawn = sample(torch.from_numpy(logits).expand(draws, -1), uniforms, temperature, top_p)
    expected = nucleus(logits.astype(np.float64), temperature, top_p)
    counts = np.bincount(drawn.numpy(), minlength=40)
    inside = expected > 0
    assert counts[~inside].sum() == 0
    common = expected * draws >= 5  # the rest is counted as one class, as the test wants
    observed = [*counts[common], counts[inside & ~common].sum()]
    wanted = [*(expected[common] * draws), expected[inside & ~common].sum() * draws]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize(
    ("top_p", "reachable"),
    [(0.01, {2}), (0.5, {2}), (0.51, {0, 2}), (0.75, {0, 2}), (0.76, {0, 1, 2}), (0.875, {0, 1, 2}), (0.9, {0, 1, 2, 3})],
)
def test_the_nucleus_ends_where_top_p_is_reached(top_p: float, reachable: set[int]) -> None:
    # 1/4, 1/8, 1/2, 1/16, 1/16: sums are exact, and of the two equal ones the lower id is in first
    logits = torch.tensor([0.25, 0.125, 0.5, 0.0625, 0.0625]).log().expand(1000, -1)
    drawn = sample(logits, torch.linspace(0, 1 - 1e-12, 1000, dtype=torch.float64), 1.0, top_p)
    assert set(drawn.tolist()) == reachable


def test_every_token_can_be_drawn_without_top_p() -> None:
    logits = torch.tensor([0.0, 3.0, -25.0])  # float32 probabilities that sum to 1 before the last is added
    probabilities = logits.softmax(-1).double()
    ends = probabilities.cumsum(0) / probabilities.sum()
    uniforms = torch.stack([torch.zeros(()), ends[0] * 0.999, ends[0] * 1.001, (ends[1] + 1) / 2, torch.tensor(1 - 2**-53)])
    assert sample(logits.expand(5, -1), uniforms.double(), 1.0, 1.0).tolist() == [0, 0, 1, 2, 2]


def test_a_forbidden_token_is_never_drawn() -> None:
    logits = torch.full((3, 300), float("-inf"))
    logits[:, 7] = logits[:, 8] = 0.0
    for top_p in (0.3, 0.9, 1.0):
        uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
        assert set(sample(logits, uniforms, 1.0, top_p).tolist()) <= {7, 8}
        assert set(draw_by_sorting(logits.softmax(-1), uniforms, top_p).tolist()) <= {7, 8}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.sampled_from([0.0, 0.02, 1.0, 4.0, 30.0]),
    st.one_of(st.just(1.0), st.floats(0.001, 1.0)),
    st.integers(0, 2**32),
)
def test_drawing_by_bins_equals_drawing_by_sorting(vocabulary: int, spread: float, top_p: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy((random.normal(0, 1, (6, vocabulary)).round(2) * spread).astype(np.float32))  # with ties
    uniforms = torch.from_numpy(random.random(6))
    expected = draw_by_sorting(logits.softmax(-1), uniforms, top_p if top_p < 1 else np.inf)
    assert sample(logits, uniforms, 1.0, top_p).tolist() == expected.tolist()


def test_each_sample_of_each_document_has_its_own_stream() -> None:
    streams = {
        (seed, document, number): tuple(document_uniforms(seed, document, number, 5))
        for seed in (0, 1, -1)
        for document in (0, 1, 2)
        for number in (0, 1, 2)
    }
    values = [value for stream in streams.values() for value in stream]
    assert len(set(values)) == len(values)  # no stream is another one shifted
    assert streams[1, 2, 0] == tuple(document_uniforms(1, 2, 0, 50)[:5])
