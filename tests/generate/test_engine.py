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
    END,
    PARTNER,
    ROOM,
    RULE,
    RUN_SEED,
    SHAPE,
    VOCABULARY,
    described,
    drawn,
    packed_logits,
    small_model,
    some_seeds,
)

from sbp_fast.generate.decoder import SamplingRule
from sbp_fast.generate.engine import Draft, Engine, Seed
from sbp_fast.generate.rng import document_uniforms
from sbp_fast.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model()


def draw_slowly(model: Transformer, seed: Seed, sample: int, rule: SamplingRule) -> Draft:
    """One document by its definition, everything computed anew for every token."""
    child, nats = [rule.first], 0.0
    for uniform in document_uniforms(RUN_SEED, seed.document, sample, rule.maximum_tokens):
        logits = packed_logits(model, seed.tokens, child)[-1]
        child.append(choose(logits.double().numpy(), uniform, rule))
        nats += float(logits.double().log_softmax(-1)[child[-1]])
        text = child[1:]
        if child[-1] == rule.end:
            return Draft(seed.number, sample, np.array(text[:-1]), "end", nats)
        width = rule.repeated_tokens
        if width and any(text[i : i + width] == text[-width:] for i in range(len(text) - width)):
            return Draft(seed.number, sample, np.array(text), "repetition", nats)
    return Draft(seed.number, sample, np.array(child[1:]), "length", nats)


def choose(logits: np.ndarray, uniform: float, rule: SamplingRule) -> int:
    """One token, in float64, drawn in the order of ids."""
    if rule.temperature == 0:
        return int(np.where(np.isin(np.arange(VOCABULARY), rule.forbidden), -np.inf, logits).argmax())
    return int(np.searchsorted(np.cumsum(probabilities(logits, rule)), uniform, "right"))


def probabilities(logits: np.ndarray, rule: SamplingRule) -> np.ndarray:
    """Of every token, in float64: the most probable ones, cut by top-k, then by top-p."""
    logits = np.where(np.isin(np.arange(VOCABULARY), rule.forbidden), -np.inf, logits)
    weights = np.exp((logits - logits.max()) / rule.temperature)
    order = np.argsort(-weights, kind="stable")[: rule.top_k or None]
    share = weights[order] / weights[order].sum()
    kept = order[np.concatenate([[True], np.cumsum(share)[:-1] < rule.top_p])] if rule.top_p < 1 else order
    nucleus = np.zeros(VOCABULARY)
    nucleus[kept] = weights[kept] / weights[kept].sum()
    return nucleus


@pytest.mark.parametrize(
    "rule",
    [
        RULE,
        replace(RULE, temperature=0.0),
        replace(RULE, top_k=3, repeated_tokens=2),
        replace(RULE, temperature=0.0, repeated_tokens=4),
        replace(RULE, temperature=1.4, top_p=1.0, maximum_tokens=17),
    ],
)
def test_documents_equal_those_drawn_slowly(model: Transformer, rule: SamplingRule) -> None:
    seeds = some_seeds(14, samples=1 if rule.temperature == 0 else 3)
    found = drawn(model, seeds, rule)
    for (number, sample), draft in found.items():
        expected = draw_slowly(model, seeds[number], sample, rule)
        assert (draft.tokens.tolist(), draft.stop) == (expected.tokens.tolist(), expected.stop)
        assert draft.log_probability == pytest.approx(expected.log_probability, rel=1e-4, abs=1e-3)
    if rule == RULE:  # worth something only if rows end at different times, in both ways
        assert len({len(draft.tokens) for draft in found.values()}) > 8
        assert {draft.stop for draft in found.values()} == {"end", "length"}
    if rule.repeated_tokens:
        assert "repetition" in {draft.stop for draft in found.values()}


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
def test_what_is_drawn_follows_the_exact_probabilities(model: Transformer, changes: dict[str, float]) -> None:
    rule = replace(RULE, maximum_tokens=1, **changes)
    text, streams = np.array([7, 31, 12]), 500
    seeds = [Seed(number, number, text, tuple(range(8))) for number in range(streams)]
    drafts = drawn(model, seeds, rule).values()
    counts = np.bincount([draft.tokens[0] if len(draft.tokens) else END for draft in drafts], minlength=VOCABULARY)
    double = Transformer(SHAPE, VOCABULARY).double()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    exact = probabilities(packed_logits(double, text, [PARTNER])[-1].numpy(), rule) * 8 * streams
    assert counts[exact == 0].sum() == 0
    common = exact >= 5  # the rest is counted as one class, as the test wants
    observed, wanted = (np.append(values[common], values[~common].sum()) for values in (counts, exact))
    assert common.sum() > 3 and chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


def test_log_probabilities_equal_the_training_models(model: Transformer) -> None:
    seeds = some_seeds(20)
    double = Transformer(SHAPE, VOCABULARY).double()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    check_log_probabilities(seeds, drawn(model, seeds), model, double)


def check_log_probabilities(
    seeds: list[Seed], drafts: dict[tuple[int, int], Draft], model: Transformer, double: Transformer
) -> None:
    """The drafts' error against float64 is at most twice that of the training model's own forward pass."""
    ours, plain = [], []
    for (number, _), draft in drafts.items():
        child = [PARTNER, *draft.tokens.tolist(), *[END] * (draft.stop == "end")]
        exact, packed = (
            packed_logits(one, seeds[number].tokens, child[:-1])
            .log_softmax(-1)
            .gather(1, torch.tensor(child[1:])[:, None])
            .sum()
            for one in (double, model)
        )
        ours.append(abs(draft.log_probability - exact.item()))
        plain.append(abs(packed.item() - exact.item()))
    assert np.mean(ours) <= 2 * np.mean(plain)


@pytest.mark.parametrize("precision", ["bfloat16", "float8_e4m3fn"])
def test_keys_and_values_may_be_kept_in_fewer_bits(precision: str) -> None:
    """Of one layer, in which a seed's own keys do not depend on how they are kept: as if the model itself rounded them."""
    shape = SHAPE.model_copy(update={"layers": 1})
    model, double = Transformer(shape, VOCABULARY), Transformer(shape, VOCABULARY).double()
    model.initialize(0)
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    seeds = some_seeds(20)
    drafts = drawn(model.eval(), seeds, room=replace(ROOM, precision=precision))
    for one in (model, double):
        round_keys_and_values(one, getattr(torch, precision))
    check_log_probabilities(seeds, drafts, model, double)


def round_keys_and_values(model: Transformer, dtype: torch.dtype) -> None:
    for block in model.layers:
        project = block.self_attn.project
        block.self_attn.project = lambda *x, project=project: (
            (found := project(*x))[0],
            *(one.to(dtype).to(found[0].dtype) for one in found[1:]),
        )


@NEEDS_SAME_BITS
@pytest.mark.parametrize(
    "room",
    [
        replace(ROOM, rows=16, prefill_tokens=40),
        replace(ROOM, rows=128, pages=2000, prefill_tokens=4000),
        replace(ROOM, pages=12),
        replace(ROOM, pages=7),
    ],
)
def test_a_document_is_the_same_bits_whatever_it_is_drawn_with(model: Transformer, room: object) -> None:
    seeds = some_seeds(40)
    expected = described(drawn(model, seeds))
    assert described(drawn(model, seeds, room=room)) == expected
    assert described(drawn(model, seeds[::-1], room=room)) == expected
    assert described(drawn(model, seeds[5:6], room=room)) == {key: expected[key] for key in ((5, 0), (5, 1), (5, 2))}


@NEEDS_SAME_BITS
def test_samples_already_drawn_are_left_out_and_change_nothing(model: Transformer) -> None:
    seeds = some_seeds(12, samples=4)
    expected = described(drawn(model, seeds))
    left = [replace(seed, samples=seed.samples[seed.number % 4 :]) for seed in seeds]
    found = described(drawn(model, left))
    assert found == {key: expected[key] for key in found} and len(found) < len(expected)


@NEEDS_SAME_BITS
@pytest.mark.parametrize("samples", [1, 2, 8])
def test_the_last_documents_are_brought_together(model: Transformer, samples: int) -> None:
    seeds, room = some_seeds(288 // samples, samples), replace(ROOM, rows=96, pages=1000)
    engine, sizes = Engine(model, RULE, room, RUN_SEED), []
    step = engine.decoder.step
    engine.decoder.step = lambda size: (sizes.append(size), step(size))[1]
    found = described({(draft.seed, draft.sample): draft for draft in engine.draw(seeds)})
    assert found == described(drawn(model, seeds))
    assert len(set(sizes)) > 3 and sizes == sorted(sizes, reverse=True)


@NEEDS_SAME_BITS
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 8)), min_size=1, max_size=30),
    st.integers(7, 40),
    st.integers(1, 40),
    st.booleans(),
)
def test_pages_never_leak_or_run_out(sizes: list[tuple[int, int]], pages: int, longest: int, ahead: bool) -> None:
    """Random arrivals in little room, with results read at once or a step late as on a GPU; `drawn` counts the pages."""
    random = np.random.default_rng(len(sizes))
    seeds = [
        Seed(number, number, random.integers(3, VOCABULARY, length), tuple(range(samples)))
        for number, (length, samples) in enumerate(sizes)
    ]
    rule, model = replace(RULE, maximum_tokens=longest), small_model()
    expected = described(drawn(model, seeds, rule))
    engine = Engine(model, rule, replace(ROOM, pages=pages), RUN_SEED)
    engine.ahead = ahead
    assert described({(draft.seed, draft.sample): draft for draft in engine.draw(seeds)}) == expected
    assert engine.pool.free == pages - 1
    assert engine.rows == engine.slots == [None] * ROOM.rows


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_the_same_in_hostile_memory(dtype: torch.dtype, precision: str) -> None:
    """Where products read what lies beside their operands, and pages that nothing has written are NaN."""
    model, seeds, room = small_model().to(dtype), some_seeds(10), replace(ROOM, precision=precision)
    expected = described(drawn(model, seeds, room=room))
    with hostile_memory() as products:
        found = described(drawn(model, seeds, room=room))
    assert products.count and found == expected


def test_special_tokens_but_the_end_are_never_drawn(model: Transformer) -> None:
    rule = replace(RULE, temperature=50.0, top_p=1.0)  # nearly uniform
    tokens = np.concatenate([draft.tokens for draft in drawn(model, some_seeds(40, samples=8), rule).values()])
    assert not np.isin(tokens, [BEGIN, END, PARTNER]).any()
    assert len(np.unique(tokens)) == VOCABULARY - 3


def test_rows_are_refilled_at_once(model: Transformer) -> None:
    """With enough work waiting, a row is never idle for two steps in a row."""
    engine = Engine(model, RULE, ROOM, RUN_SEED)
    held: list[int] = []
    step = engine.decoder.step
    engine.decoder.step = lambda size: (held.append(sum(row is not None for row in engine.rows)), step(size))[1]
    list(engine.draw(some_seeds(60)))
    busy = held[: next(i for i, count in enumerate(held) if count < ROOM.rows)]
    assert set(busy) == {ROOM.rows} and len(busy) > RULE.maximum_tokens
    assert held[-1] < ROOM.rows and engine.size < ROOM.rows  # and the last ones are brought together


def test_a_room_too_small_for_one_document_is_refused(model: Transformer) -> None:
    drawn(model, some_seeds(6), room=replace(ROOM, pages=7))  # 3 pages of a seed, 3 of a document, the scratch page
    with pytest.raises(ValueError, match="6 pages do not hold one seed and one document, which take 7"):
        Engine(model, RULE, replace(ROOM, pages=6), RUN_SEED)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_gpu_draws_what_the_cpu_draws(model: Transformer, temperature: float) -> None:
    """In float32, by graphs of several sizes, with results that come a step late."""
    rule, room = replace(RULE, temperature=temperature, repeated_tokens=4), replace(ROOM, rows=64, pages=40)
    seeds = some_seeds(60)
    texts = [
        {key: (draft.tokens.tolist(), draft.stop) for key, draft in drawn(one, seeds, rule, room).items()}
        for one in (model, small_model().cuda())
    ]
    assert texts[0] == texts[1]
