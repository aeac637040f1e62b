import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout

from sbp_fast.config import ModelConfig
from sbp_fast.errors import UserError
from sbp_fast.evaluate.likelihood import Extent, choice_trees, document_trees, log_likelihoods
from sbp_fast.model.transformer import Transformer

VOCABULARY, CONTEXT = 61, 24
CONFIG = ModelConfig(
    layers=2, hidden_size=32, heads=4, kv_heads=2, head_dim=8, intermediate_size=48, context=CONTEXT, tied_embeddings=False
)
MODEL = Transformer(CONFIG, VOCABULARY)
MODEL.initialize(1)
MODEL.double()
with torch.no_grad():
    for parameter in MODEL.parameters():
        parameter *= 4  # far from uniform predictions: a wrong mask or row then shows

token = st.integers(0, VOCABULARY - 1)


def alone(tokens: list[int], first: int) -> float:
    """Log-probability of tokens[first:], each after all before it, by a full softmax of one sequence run alone."""
    with torch.no_grad():
        hidden = MODEL(torch.tensor(tokens), PackedLayout.from_lengths([len(tokens)]))
        table = MODEL.logits(hidden).log_softmax(-1)
    return sum(float(table[index - 1, tokens[index]]) for index in range(first, len(tokens)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(token, min_size=2, max_size=CONTEXT + 1), min_size=1, max_size=6), st.integers(1, 80))
def test_packed_documents_score_as_each_document_alone(documents: list[list[int]], packed_tokens: int) -> None:
    trees = document_trees([np.array(document, np.uint16) for document in documents], CONTEXT)
    scores, extent = log_likelihoods(MODEL, trees, len(documents), packed_tokens=packed_tokens)
    np.testing.assert_allclose(scores, [alone(document, 1) for document in documents], rtol=1e-12, atol=1e-12)
    sizes = [len(document) - 1 for document in documents]
    assert extent == Extent(sum(sizes), sum(size * (size + 1) // 2 for size in sizes), sum(sizes))


def test_document_longer_than_the_context_has_every_token_predicted_once() -> None:
    document = np.random.default_rng(0).integers(0, VOCABULARY, 2 * CONTEXT + 7)
    scores, extent = log_likelihoods(MODEL, document_trees([document], CONTEXT), 1)
    starts = range(0, len(document) - 1, CONTEXT)
    expected = sum(alone(document[start : start + CONTEXT + 1].tolist(), 1) for start in starts)
    np.testing.assert_allclose(scores, [expected], rtol=1e-12)
    assert extent.predictions == len(document) - 1


question = st.tuples(
    st.lists(token, min_size=1, max_size=12), st.lists(st.lists(token, min_size=1, max_size=8), min_size=2, max_size=4)
)


@settings(max_examples=25, deadline=None)
@given(st.lists(question, min_size=1, max_size=4), st.integers(1, 80))
def test_choices_under_a_shared_prompt_score_as_separate_sequences(
    questions: list[tuple[list[int], list[list[int]]]], packed_tokens: int
) -> None:
    count = sum(len(choices) for _, choices in questions)
    scores, extent = log_likelihoods(MODEL, choice_trees(questions, CONTEXT), count, packed_tokens=packed_tokens)
    expected = [alone([*prompt, *choice], len(prompt)) for prompt, choices in questions for choice in choices]
    np.testing.assert_allclose(scores, expected, rtol=1e-12, atol=1e-12)
    assert extent.tokens == sum(len(prompt) + sum(len(choice) - 1 for choice in choices) for prompt, choices in questions)


def test_prompt_too_long_for_the_context_is_truncated_at_its_beginning() -> None:
    prompt, choices = list(range(CONTEXT + 10)), [[1, 2, 3, 4], [5]]
    scores, _ = log_likelihoods(MODEL, choice_trees([(prompt, choices)], CONTEXT), 2)
    truncated = prompt[-(CONTEXT - 3) :]
    np.testing.assert_allclose(scores, [alone([*truncated, *choice], len(truncated)) for choice in choices], rtol=1e-12)


def test_choice_longer_than_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="questions, question 2: a choice is longer than the model's context of 24 tokens"):
        choice_trees([([1], [[2], [3]]), ([1], [[2], [3] * (CONTEXT + 1)])], CONTEXT)


def test_log_likelihoods_in_float32_are_as_exact_as_torch_in_float32() -> None:
    """Error against float64 at most twice that of running each document alone in float32."""
    single = Transformer(CONFIG, VOCABULARY)
    single.load_state_dict(MODEL.state_dict())
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, VOCABULARY, length) for length in (2, 9, 24, 25, 17)]
    trees = document_trees(documents, CONTEXT)
    exact, _ = log_likelihoods(MODEL, trees, len(documents))
    packed, _ = log_likelihoods(single, trees, len(documents))
    plain = []
    for document in documents:
        with torch.no_grad():
            hidden = single(torch.from_numpy(document[:-1]), PackedLayout.from_lengths([len(document) - 1]))
            loss = torch.nn.functional.cross_entropy(single.logits(hidden), torch.from_numpy(document[1:]), reduction="sum")
        plain.append(-float(loss))
    assert np.abs(packed - exact).max() <= 2 * np.abs(np.array(plain) - exact).max()
