from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import configure, write_documents

from sbp_fast.config import TrainConfig
from sbp_fast.corpus.shards import Corpus
from sbp_fast.errors import UserError
from sbp_fast.train.batches import NO_TARGET, CorpusBatches, PackedBatch, PairBatches, cut_window, next_fit, plan_groups

PARTNER, CONTEXT = 299, 20
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def numbered(directory: Path, lengths: list[int], first: int = 0) -> Corpus:
    """Documents in which every token is its own number, so that each can be told from all others."""
    ends = np.cumsum(lengths) + first
    return write_documents(
        directory, [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)], 1 << 14
    )


def pair_set(groups: dict[int, list[int]]) -> SimpleNamespace:
    return SimpleNamespace(groups=lambda: [(seed, np.array(partners)) for seed, partners in groups.items()])


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(2, 30), st.integers(3, 50))
def test_each_token_is_an_input_once_an_epoch_and_a_target_unless_it_begins_a_document(
    lengths: list[int], window: int, context: int
) -> None:
    with TemporaryDirectory() as directory:
        corpus = numbered(Path(directory), lengths)
        epochs = 3
        windows = min(window, corpus.tokens)
        steps = -(-corpus.tokens // windows) * epochs
        recipe = f"pretrain={{tokens={steps * window}, tokens_per_step={window}, window={window}}}"
        config = configure(Path(directory), recipe, f"model.context={context}")
        batches = CorpusBatches(corpus, None, config)
        seen, learnt = Counter[int](), Counter[int]()
        for batch in (batches.batch(step) for step in range(batches.steps)):
            tokens, targets, positions = batch.tokens.numpy(), batch.targets.numpy(), batch.layout.positions.numpy()
            seen.update(tokens.tolist())
            learnt.update(targets[targets != NO_TARGET].tolist())
            assert np.array_equal(targets[targets != NO_TARGET], tokens[targets != NO_TARGET] + 1)
            assert (positions[np.isin(tokens, corpus.offsets)] == 0).all()
            assert max(batch.layout.lengths) <= context
            assert batch.loss_tokens == (targets != NO_TARGET).sum()
        rounds = epochs * max(1, window // windows)  # a corpus smaller than a window is read several times a step
        firsts = set(corpus.offsets.tolist())
        assert seen == dict.fromkeys(range(corpus.tokens), rounds)
        assert learnt == {token: rounds for token in range(corpus.tokens) if token not in firsts}


def test_a_window_by_hand(tmp_path: Path) -> None:
    corpus = write_documents(tmp_path, [np.array([1, 2, 3]), np.array([4, 5, 6, 7, 8, 9]), np.array([10, 11])])
    tokens, targets, lengths = cut_window(corpus, 1, 8, context=4)
    assert tokens.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert targets.tolist() == [3, -100, 5, 6, 7, 8, 9]  # 9 lies beyond the window
    assert lengths.tolist() == [2, 4, 1]


def test_an_end_token_inside_a_document_ends_nothing(tmp_path: Path) -> None:
    document = np.array([0, 5, 1, 5, 1])  # the end token, 1, in the middle too
    _, targets, lengths = cut_window(write_documents(tmp_path, [document, document]), 0, 10, context=96)
    assert lengths.tolist() == [5, 5]
    assert targets.tolist() == [5, 1, 5, 1, -100] * 2


def test_joint_batches_repeat_no_synthetic_token_and_keep_the_share(tmp_path: Path) -> None:
    real, synthetic = numbered(tmp_path / "real", [30] * 10), numbered(tmp_path / "synthetic", [30] * 8, first=5000)
    for share, expected in ((0.25, 0.25), (0.9, 4 / 20)):  # 240 synthetic tokens make 4 windows of 64
        recipe = "pretrain={tokens=1280, tokens_per_step=128, window=64}"
        batches = CorpusBatches(real, synthetic, configure(tmp_path, recipe, f"joint.maximum_synthetic_share={share / 1.25}"))
        all_batches = [batches.batch(step) for step in range(batches.steps)]
        tokens = np.concatenate([batch.tokens.numpy() for batch in all_batches])
        assert max(Counter(tokens[tokens >= 5000].tolist()).values()) == 1
        assert sum(batch.synthetic_tokens for batch in all_batches) == (tokens >= 5000).sum()
        assert sum(batch.real_tokens for batch in all_batches) == (tokens < 5000).sum()
        assert batches.synthetic_share == pytest.approx(expected / (1.25 if share == 0.25 else 1))


def test_windows_that_do_not_fill_a_step_are_refused(tmp_path: Path) -> None:
    config = configure(tmp_path, "pretrain={tokens=1280, tokens_per_step=100, window=64}")
    with pytest.raises(UserError, match=r"no multiple of pretrain\.window"):
        CorpusBatches(numbered(tmp_path / "real", [30]), None, config)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(40, 90))
def test_an_epoch_of_pairs_holds_each_partner_once_after_its_seed(
    data: st.DataObject, lengths: list[int], capacity: int
) -> None:
    documents = st.integers(0, len(lengths) - 1)
    members = st.lists(documents, min_size=1, max_size=6, unique=True)
    groups = data.draw(st.dictionaries(documents, members, min_size=1))
    pairs = [(seed, partner) for seed, partners in groups.items() for partner in partners]
    wanted = {(seed, partner) for seed, partner in pairs if lengths[partner] <= CONTEXT}
    with TemporaryDirectory() as directory:
        corpus = numbered(Path(directory), lengths)
        plan, too_long = plan_groups(corpus, pair_set(groups), CONTEXT, capacity)
        assert too_long == len(pairs) - len(wanted)
        assert Counter((seed, int(partner)) for seed, partners in plan for partner in partners) == dict.fromkeys(wanted, 1)
        if not wanted:
            return
        recipe = TrainConfig(tokens=300, tokens_per_step=capacity)
        batches = PairBatches(corpus, pair_set(groups), PARTNER, recipe, CONTEXT, seed=1)
        found = Counter(pair for step in range(batches.steps) for pair in check_pairs(batches.batch(step), corpus, capacity))
        epochs = int(batches.epochs)
        assert {found[pair] for pair in wanted} <= {epochs, epochs + 1} and found.keys() <= wanted
        assert 300 <= batches.tokens < 300 + capacity


def check_pairs(batch: PackedBatch, corpus: Corpus, capacity: int) -> list[tuple[int, int]]:
    """The pairs in a batch, every token and target of it checked."""
    assert len(batch.tokens) <= capacity
    segments = [segment.tolist() for segment in batch.tokens.split(batch.layout.lengths)]
    targets = [segment.tolist() for segment in batch.targets.split(batch.layout.lengths)]
    pairs = []
    for tokens, goals, parent in zip(segments, targets, batch.layout.parents, strict=True):
        document = int(np.searchsorted(corpus.offsets, tokens[-1], "right")) - 1
        if parent == -1:
            assert tokens == corpus[document][:CONTEXT].tolist()
            assert set(goals) == {NO_TARGET}
        else:
            rest = corpus[document][1:].tolist()
            assert (tokens, goals) == ([PARTNER, *rest], [*rest, NO_TARGET])
            seed = int(np.searchsorted(corpus.offsets, segments[parent][0], "right")) - 1
            pairs.append((seed, document))
    return pairs


def test_a_pair_that_no_step_holds_is_refused(tmp_path: Path) -> None:
    corpus = numbered(tmp_path, [10, 12])
    with pytest.raises(UserError, match=r"at least twice model\.context, 40"):
        PairBatches(corpus, pair_set({0: [1]}), PARTNER, TrainConfig(tokens_per_step=39), 20, seed=0)
    with pytest.raises(UserError, match=r"no partner is within model\.context = 11"):
        PairBatches(corpus, pair_set({0: [1]}), PARTNER, TrainConfig(tokens_per_step=39), 11, seed=0)


@given(st.lists(st.integers(1, 10), max_size=30), st.integers(10, 30))
def test_next_fit_leaves_nothing_out_and_opens_no_stream_too_early(sizes: list[int], capacity: int) -> None:
    parts = [sizes[part] for part in next_fit(np.array(sizes, int), capacity)]
    assert [size for part in parts for size in part] == sizes
    assert all(sum(part) <= capacity for part in parts)
    assert all(sum(part) + after[0] > capacity for part, after in pairwise(parts))
