from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from products import hostile_memory
from rounding import NEEDS_SAME_BITS
from scipy.stats import chisquare
from tiny_generation import (
    BEGIN,
    CACHE,
    END,
    PARTNER,
    RUN_SEED,
    SAMPLING,
    SHAPE,
    VOCABULARY,
    described,
    generate,
    packed_logits,
    small_model,
    some_seeds,
)

from sbp_fast.generate.decoder import KVCacheConfig, SamplingParams
from sbp_fast.generate.engine import Engine, GenerationResult, Seed
from sbp_fast.generate.rng import document_uniforms
from sbp_fast.generate.seeds import NO_SEED
from sbp_fast.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model()


def generate_by_definition(model: Transformer, seed: Seed, sample: int, sampling: SamplingParams) -> GenerationResult:
    """Return one document by its definition, with everything computed anew for every token."""
    child, nats = [sampling.first], 0.0
    for uniform in document_uniforms(RUN_SEED, seed.document, sample, sampling.maximum_tokens):
        logits = packed_logits(model, seed.tokens, child)[-1]
        child.append(choose(logits.double().numpy(), uniform, sampling))
        nats += float(logits.double().log_softmax(-1)[child[-1]])
        text = child[1:]
        if child[-1] == sampling.end:
            return GenerationResult(seed.number, sample, np.array(text[:-1]), "end", nats)
        width = sampling.repeated_tokens
        if width and any(text[i : i + width] == text[-width:] for i in range(len(text) - width)):
            return GenerationResult(seed.number, sample, np.array(text), "repetition", nats)
    return GenerationResult(seed.number, sample, np.array(child[1:]), "length", nats)


def choose(logits: np.ndarray, uniform: float, sampling: SamplingParams) -> int:
    """Sample one token in float64, by the inverse of the cumulative distribution in the order of ids."""
    if sampling.temperature == 0:
        return int(np.where(np.isin(np.arange(VOCABULARY), sampling.forbidden), -np.inf, logits).argmax())
    return int(np.searchsorted(np.cumsum(probabilities(logits, sampling)), uniform, "right"))


def probabilities(logits: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """Return the probability of every token in float64, after top-k and then top-p."""
    logits = np.where(np.isin(np.arange(VOCABULARY), sampling.forbidden), -np.inf, logits)
    weights = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-weights, kind="stable")[: sampling.top_k or None]
    share = weights[order] / weights[order].sum()
    kept = order[np.concatenate([[True], np.cumsum(share)[:-1] < sampling.top_p])] if sampling.top_p < 1 else order
    nucleus = np.zeros(VOCABULARY)
    nucleus[kept] = weights[kept] / weights[kept].sum()
    return nucleus


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        replace(SAMPLING, temperature=0.0),
        replace(SAMPLING, top_k=3, repeated_tokens=2),
        replace(SAMPLING, temperature=0.0, repeated_tokens=4),
        replace(SAMPLING, temperature=1.4, top_p=1.0, maximum_tokens=17),
    ],
)
def test_documents_equal_those_generated_by_the_definition(model: Transformer, sampling: SamplingParams) -> None:
    seeds = some_seeds(14, samples=1 if sampling.temperature == 0 else 3)
    results = generate(model, seeds, sampling)
    for (number, sample), result in results.items():
        expected = generate_by_definition(model, seeds[number], sample, sampling)
        assert (result.tokens.tolist(), result.stop) == (expected.tokens.tolist(), expected.stop)
        assert result.log_probability == pytest.approx(expected.log_probability, rel=1e-4, abs=1e-3)
    if sampling == SAMPLING:  # worth something only if rows end at different times, in both ways
        assert len({len(result.tokens) for result in results.values()}) > 8
        assert {result.stop for result in results.values()} == {"end", "length"}
    if sampling.repeated_tokens:
        assert "repetition" in {result.stop for result in results.values()}


def test_documents_without_a_seed_equal_those_generated_by_the_definition(model: Transformer) -> None:
    sampling, empty = replace(SAMPLING, first=BEGIN), np.zeros(0, np.int64)
    seeds = [Seed(number, NO_SEED, empty, (2 * number, 2 * number + 1)) for number in range(12)]
    results = generate(model, seeds, sampling)
    assert len(results) == 24 and len({tuple(result.tokens.tolist()) for result in results.values()}) > 12
    for (number, sample), result in results.items():
        expected = generate_by_definition(model, seeds[number], sample, sampling)
        assert (result.tokens.tolist(), result.stop) == (expected.tokens.tolist(), expected.stop)
        assert result.log_probability == pytest.approx(expected.log_probability, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 1.7, "top_p": 1.0},
        {"top_p": 0.8},
        {"top_k": 6, "top_p": 1.0},
        {"top_k": 9},
    ],
)
def test_sampled_tokens_follow_the_exact_probabilities(model: Transformer, changes: dict[str, float]) -> None:
    sampling = replace(SAMPLING, maximum_tokens=1, **changes)
    text, streams = np.array([7, 31, 12]), 500
    seeds = [Seed(number, number, text, tuple(range(8))) for number in range(streams)]
    results = generate(model, seeds, sampling).values()
    counts = np.bincount([result.tokens[0] if len(result.tokens) else END for result in results], minlength=VOCABULARY)
    double = Transformer(SHAPE, VOCABULARY).double()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    exact = probabilities(packed_logits(double, text, [PARTNER])[-1].numpy(), sampling) * 8 * streams
    assert counts[exact == 0].sum() == 0
    common = exact >= 5  # the rest is counted as one class, as the test wants
    observed, wanted = (np.append(values[common], values[~common].sum()) for values in (counts, exact))
    assert common.sum() > 3 and chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


def test_log_probabilities_equal_those_of_the_training_forward_pass(model: Transformer) -> None:
    seeds = some_seeds(20)
    double = Transformer(SHAPE, VOCABULARY).double()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    check_log_probabilities(seeds, generate(model, seeds), model, double)


def check_log_probabilities(
    seeds: list[Seed], results: dict[tuple[int, int], GenerationResult], model: Transformer, double: Transformer
) -> None:
    """The results' error against float64 is at most twice that of the training model's own forward pass."""
    ours, plain = [], []
    for (number, _), result in results.items():
        child = [PARTNER, *result.tokens.tolist(), *[END] * (result.stop == "end")]
        exact, packed = (
            packed_logits(one, seeds[number].tokens, child[:-1])
            .log_softmax(-1)
            .gather(1, torch.tensor(child[1:])[:, None])
            .sum()
            for one in (double, model)
        )
        ours.append(abs(result.log_probability - exact.item()))
        plain.append(abs(packed.item() - exact.item()))
    assert np.mean(ours) <= 2 * np.mean(plain)


@pytest.mark.parametrize("precision", ["bfloat16", "float8_e4m3fn"])
def test_cache_of_fewer_bits_equals_a_model_that_rounds_keys_and_values(precision: str) -> None:
    """With one layer, a seed's own keys do not depend on the precision of the cache."""
    shape = SHAPE.model_copy(update={"layers": 1})
    model, double = Transformer(shape, VOCABULARY), Transformer(shape, VOCABULARY).double()
    model.initialize(0)
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    seeds = some_seeds(20)
    results = generate(model.eval(), seeds, cache=replace(CACHE, precision=precision))
    for one in (model, double):
        round_keys_and_values(one, getattr(torch, precision))
    check_log_probabilities(seeds, results, model, double)


def round_keys_and_values(model: Transformer, dtype: torch.dtype) -> None:
    for block in model.layers:
        project = block.self_attn.project
        block.self_attn.project = lambda *x, project=project: (
            (projected := project(*x))[0],
            *(tensor.to(dtype).to(projected[0].dtype) for tensor in projected[1:]),
        )


@NEEDS_SAME_BITS
@pytest.mark.parametrize(
    "cache",
    [
        replace(CACHE, rows=16, prefill_tokens=40),
        replace(CACHE, rows=128, pages=2000, prefill_tokens=4000),
        replace(CACHE, pages=12),
        replace(CACHE, pages=7),
    ],
)
def test_document_is_the_same_bits_in_any_batch_and_cache(model: Transformer, cache: KVCacheConfig) -> None:
    seeds = some_seeds(40)
    expected = described(generate(model, seeds))
    assert described(generate(model, seeds, cache=cache)) == expected
    assert described(generate(model, seeds[::-1], cache=cache)) == expected
    assert described(generate(model, seeds[5:6], cache=cache)) == {key: expected[key] for key in ((5, 0), (5, 1), (5, 2))}


@NEEDS_SAME_BITS
def test_leaving_out_generated_samples_changes_no_other(model: Transformer) -> None:
    seeds = some_seeds(12, samples=4)
    expected = described(generate(model, seeds))
    left = [replace(seed, samples=seed.samples[seed.number % 4 :]) for seed in seeds]
    results = described(generate(model, left))
    assert results == {key: expected[key] for key in results} and len(results) < len(expected)


@NEEDS_SAME_BITS
@pytest.mark.parametrize("samples", [1, 2, 8])
def test_last_documents_move_into_fewer_rows_and_stay_the_same(model: Transformer, samples: int) -> None:
    seeds, cache = some_seeds(288 // samples, samples), replace(CACHE, rows=96, pages=1000)
    engine, sizes = Engine(model, SAMPLING, cache, RUN_SEED), []
    step = engine.decoder.step
    engine.decoder.step = lambda size: (sizes.append(size), step(size))[1]
    results = described({(result.seed, result.sample): result for result in engine.generate(seeds)})
    assert results == described(generate(model, seeds))
    assert len(set(sizes)) > 3 and sizes == sorted(sizes, reverse=True)


@NEEDS_SAME_BITS
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), min_size=1, max_size=30),
    st.integers(7, 40),
    st.integers(1, 40),
    st.booleans(),
)
def test_random_arrivals_neither_leak_pages_nor_run_out_of_them(
    sizes: list[tuple[int, int]], pages: int, longest: int, overlap: bool
) -> None:
    """In a small cache, with results read at once or a step late as on a GPU; `generate` counts the pages."""
    random = np.random.default_rng(len(sizes))
    seeds = [
        Seed(number, number, random.integers(3, VOCABULARY, length), tuple(range(samples)))
        for number, (length, samples) in enumerate(sizes)
    ]
    sampling, model = replace(SAMPLING, maximum_tokens=longest), small_model()
    expected = described(generate(model, seeds, sampling))
    engine = Engine(model, sampling, replace(CACHE, pages=pages), RUN_SEED)
    engine.overlap = overlap
    assert described({(result.seed, result.sample): result for result in engine.generate(seeds)}) == expected
    assert engine.pool.free == pages - 1
    assert engine.requests == engine.groups == [None] * CACHE.rows


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_do_not_depend_on_uninitialised_memory(dtype: torch.dtype, precision: str) -> None:
    """Products read the memory beside their operands, and pages that nothing has written are NaN."""
    model, seeds, cache = small_model().to(dtype), some_seeds(10), replace(CACHE, precision=precision)
    expected = described(generate(model, seeds, cache=cache))
    with hostile_memory() as products:
        results = described(generate(model, seeds, cache=cache))
    assert products.count and results == expected


def test_special_tokens_other_than_the_end_are_never_sampled(model: Transformer) -> None:
    sampling = replace(SAMPLING, temperature=50.0, top_p=1.0)  # nearly uniform
    tokens = np.concatenate([result.tokens for result in generate(model, some_seeds(40, samples=8), sampling).values()])
    assert not np.isin(tokens, [BEGIN, END, PARTNER]).any()
    assert len(np.unique(tokens)) == VOCABULARY - 3


def test_free_rows_are_refilled_in_the_next_step(model: Transformer) -> None:
    """With enough work waiting, a row is never idle for two steps in a row."""
    engine = Engine(model, SAMPLING, CACHE, RUN_SEED)
    running: list[int] = []
    step = engine.decoder.step
    engine.decoder.step = lambda size: (running.append(sum(row is not None for row in engine.requests)), step(size))[1]
    list(engine.generate(some_seeds(60)))
    busy = running[: next(i for i, count in enumerate(running) if count < CACHE.rows)]
    assert set(busy) == {CACHE.rows} and len(busy) > SAMPLING.maximum_tokens
    assert running[-1] < CACHE.rows and engine.size < CACHE.rows  # and the last ones are brought together


def test_cache_too_small_for_one_document_is_refused(model: Transformer) -> None:
    generate(model, some_seeds(6), cache=replace(CACHE, pages=7))  # 3 pages of a seed, 3 of a document, the scratch page
    with pytest.raises(ValueError, match="6 pages do not hold one seed and one document, which take 7"):
        Engine(model, SAMPLING, replace(CACHE, pages=6), RUN_SEED)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_gpu_generates_the_documents_of_the_cpu(model: Transformer, temperature: float) -> None:
    """In float32, by graphs of several sizes, with results that come a step late."""
    sampling, cache = replace(SAMPLING, temperature=temperature, repeated_tokens=4), replace(CACHE, rows=64, pages=40)
    seeds = some_seeds(60)
    texts = [
        {key: (result.tokens.tolist(), result.stop) for key, result in generate(one, seeds, sampling, cache).items()}
        for one in (model, small_model().cuda())
    ]
    assert texts[0] == texts[1]
