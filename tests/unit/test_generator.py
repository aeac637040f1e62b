import numpy as np
import pytest
import torch
from sbp_kernels import PackedLayout, sample_tokens

from sbp_fast.config import ModelConfig
from sbp_fast.model.transformer import Transformer
from sbp_fast.synthesize import generator
from sbp_fast.synthesize.generator import Draft, SamplingRule, SharedSeedCache, generate

CONFIG = ModelConfig(layers=2, width=32, heads=4, key_value_heads=2, head_width=8, feed_forward_width=48, context=40)
VOCABULARY, BEGIN, END, PARTNER = 50, 0, 1, 2
RULE = SamplingRule(PARTNER, END, (BEGIN, PARTNER), 24, temperature=0.9, top_p=0.95)
LENGTHS = (3, 7, 11, 12, 30)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG, VOCABULARY)
    model.initialize(0)
    with torch.no_grad():  # far from uniform: each token matters for the next ones
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
        model.embed_tokens.weight.mul_(0.3)
        for block in model.layers:
            block.self_attn.q_norm.weight.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def seeds() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(3, VOCABULARY, length) for length in LENGTHS]


def packed_logits(model: Transformer, seed: np.ndarray, child: list[int]) -> torch.Tensor:
    """Logits [len(child), V] after each token of a partner, by the training model's own forward pass."""
    tokens = torch.tensor([*seed.tolist(), *child])
    layout = PackedLayout.from_tree([len(seed), len(child)], [-1, 0])
    with torch.inference_mode():
        return model.logits(model(tokens, layout))[len(seed) :]


def draw_slowly(model: Transformer, seed: np.ndarray, uniforms: np.ndarray, rule: SamplingRule) -> Draft:
    """One document, everything computed anew for every token."""
    child = [rule.first]
    for uniform in uniforms:
        logits = packed_logits(model, seed, child)[-1:]
        options = {"temperature": rule.temperature, "top_p": rule.top_p, "forbidden": torch.tensor(rule.forbidden)}
        child.append(int(sample_tokens(logits, torch.tensor([uniform]), **options)[0]))
        if child[-1] == rule.end:
            return Draft(np.array(child[1:-1], np.int64), True)
    return Draft(np.array(child[1:], np.int64), False)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("prefill_tokens", [1, 20, 4096])
def test_documents_equal_those_drawn_slowly(
    model: Transformer, seeds: list[np.ndarray], samples: int, prefill_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "PREFILL_TOKENS", prefill_tokens)
    uniforms = np.random.default_rng(1).random((len(seeds) * samples, RULE.maximum_tokens))
    drafts = generate(model, seeds, samples, uniforms, RULE)
    expected = [draw_slowly(model, seeds[row // samples], uniforms[row], RULE) for row in range(len(uniforms))]
    assert [draft.tokens.tolist() for draft in drafts] == [draft.tokens.tolist() for draft in expected]
    assert [draft.finished for draft in drafts] == [draft.finished for draft in expected]
    if samples == 3:  # the case is only worth something if rows end at different times
        assert len({len(draft.tokens) for draft in drafts}) > 4
        assert {draft.finished for draft in drafts} == {True, False}


def test_probabilities_equal_the_training_models(model: Transformer, seeds: list[np.ndarray]) -> None:
    samples, steps = 2, 10
    random = np.random.default_rng(2)
    children = np.concatenate([np.full((10, 1), PARTNER), random.integers(3, VOCABULARY, (10, steps - 1))], 1)
    leaving = {3: [0, 1, 5], 6: [9, 2]}  # after these steps, these rows
    rows = torch.arange(10)
    double = Transformer(CONFIG, VOCABULARY).double()
    double.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.inference_mode():
        cache = SharedSeedCache(model, seeds, samples, steps)
        for step in range(steps):
            found = cache.step(torch.from_numpy(children[rows, step])).softmax(-1)
            for place, row in enumerate(rows.tolist()):
                child = children[row, : step + 1].tolist()
                exact = packed_logits(double, seeds[row // samples], child)[-1].softmax(-1)
                packed = packed_logits(model, seeds[row // samples], child)[-1].softmax(-1)
                rounding = (packed - exact).abs().max()
                assert (found[place] - exact).abs().max() <= 2 * rounding + 4 * torch.finfo(torch.float32).eps
            live = ~torch.isin(rows, torch.tensor(leaving.get(step, [])))
            rows = rows[cache.keep(live)]
    assert sorted(rows.tolist()) == [3, 4, 6, 7, 8]


def test_a_document_does_not_depend_on_its_batch(model: Transformer, seeds: list[np.ndarray]) -> None:
    uniforms = np.random.default_rng(3).random((len(seeds) * 2, RULE.maximum_tokens))
    together = generate(model, seeds, 2, uniforms, RULE)
    alone = [generate(model, [seeds[row // 2]], 1, uniforms[row : row + 1], RULE)[0] for row in range(len(uniforms))]
    assert [draft.tokens.tolist() for draft in together] == [draft.tokens.tolist() for draft in alone]


def test_unused_memory_and_padding_never_reach_a_result(
    model: Transformer, seeds: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    uniforms = np.random.default_rng(4).random((len(seeds) * 2, RULE.maximum_tokens))
    expected = generate(model, seeds, 2, uniforms, RULE)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    poisoned = generate(model, seeds, 2, uniforms, RULE)
    assert [draft.tokens.tolist() for draft in poisoned] == [draft.tokens.tolist() for draft in expected]


def test_progress_counts_every_document_and_token(model: Transformer, seeds: list[np.ndarray]) -> None:
    calls: list[tuple[int, int]] = []
    uniforms = np.random.default_rng(5).random((len(seeds) * 2, RULE.maximum_tokens))
    drafts = generate(model, seeds, 2, uniforms, RULE, lambda documents, tokens: calls.append((documents, tokens)))
    assert sum(documents for documents, _ in calls) == len(drafts)
    assert sum(tokens for _, tokens in calls) == sum(len(draft.tokens) + draft.finished for draft in drafts)


def test_special_tokens_but_the_end_are_never_drawn(model: Transformer, seeds: list[np.ndarray]) -> None:
    uniforms = np.random.default_rng(6).random((len(seeds) * 8, RULE.maximum_tokens))
    rule = SamplingRule(PARTNER, END, (BEGIN, PARTNER), RULE.maximum_tokens, temperature=50.0)  # nearly uniform
    drawn = np.concatenate([draft.tokens for draft in generate(model, seeds, 8, uniforms, rule)])
    assert not np.isin(drawn, [BEGIN, END, PARTNER]).any()
    assert len(np.unique(drawn)) == VOCABULARY - 3
