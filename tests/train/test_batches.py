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

from sbp_fast.config import RunConfig, TrainConfig
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.train.data.batches import NO_TARGET, Batches, PackedBatch, divide_sequences
from sbp_fast.train.data.corpus_batches import CorpusBatches, PackedDocuments
from sbp_fast.train.data.pair_batches import PairBatches, split_groups
from sbp_fast.train.task import TrainTask

PARTNER, CONTEXT = 16_000, 20
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def corpus_batches(real: Corpus, config: RunConfig, synthetic: Corpus | None = None) -> CorpusBatches:
    """Batches of the baseline, or with synthetic documents those of SBP."""
    task = TrainTask.of_arm(config, "baseline" if synthetic is None else "sbp")
    return CorpusBatches(real, synthetic, task, config.model.context)


def numbered(directory: Path, lengths: list[int], first: int = 1) -> Corpus:
    """Documents in which every token is its own number, so that each can be told from all others and from padding, 0."""
    ends = np.cumsum(lengths) + first
    return write_documents(
        directory, [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)], 1 << 14
    )


def pair_set(groups: dict[int, list[int]]) -> SimpleNamespace:
    pairs = [(seed, partner) for seed in sorted(groups) for partner in groups[seed]]
    seeds, partners = np.array(pairs, np.int64).reshape(-1, 2).T
    return SimpleNamespace(seeds=seeds, partners=partners, fingerprint="pairs")


def sequences(batches: Batches, steps: range | None = None) -> list[PackedBatch]:
    chosen = range(batches.steps) if steps is None else steps
    return [batches.sequence(step, index) for step in chosen for index in range(batches.sequences_per_step)]


def check_sequence(batch: PackedBatch, length: int) -> None:
    """Check what holds of every packed sequence."""
    tokens, targets, counts = batch.tokens.numpy(), batch.targets.numpy(), batch.counts
    rows = batch.loss_rows.numpy()
    carrying = np.flatnonzero(targets != NO_TARGET)
    assert len(tokens) == len(targets) == len(batch.layout) == counts.tokens == length
    assert rows[: len(carrying)].tolist() == carrying.tolist()
    assert (targets[rows[len(carrying) :]] == NO_TARGET).all()
    assert len(rows) <= length and (len(rows) % 256 == 0 or len(rows) == length)
    assert counts.loss_tokens == len(carrying)
    padding = length - counts.real_tokens - counts.synthetic_tokens
    assert (tokens[length - padding :] == 0).all() and (tokens[: length - padding] != 0).all()
    assert not padding or (batch.layout.lengths[-1], batch.layout.parents[-1]) == (padding, -1)
    visible = batch.layout.visible_until.numpy()[: length - padding] - np.arange(length - padding)
    assert counts.visible_pairs == visible.sum()


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.integers(1, 50), st.integers(0, 40), st.integers(1, 3))
def test_each_token_is_an_input_once_an_epoch_and_a_target_unless_it_begins_a_document(
    lengths: list[int], context: int, room: int, per_step: int
) -> None:
    with TemporaryDirectory() as directory:
        corpus, size, epochs = numbered(Path(directory), lengths), context + room, 3
        bins = PackedDocuments.pack(corpus, size, context, 0).packing.bins
        step = per_step * size
        recipe = f"pretrain={{tokens={bins * epochs * step}, tokens_per_step={step}, microbatch_tokens={size}}}"
        batches = corpus_batches(
            corpus, configure(Path(directory), recipe, f"model.context={context}", "filter.minimum_tokens=1")
        )
        seen, learnt = Counter[int](), Counter[int]()
        for batch in sequences(batches):
            check_sequence(batch, size)
            tokens, targets, positions = batch.tokens.numpy(), batch.targets.numpy(), batch.layout.positions.numpy()
            seen.update(tokens[tokens > 0].tolist())
            learnt.update(targets[targets != NO_TARGET].tolist())
            assert np.array_equal(targets[targets != NO_TARGET], tokens[targets != NO_TARGET] + 1)
            assert (positions[np.isin(tokens, corpus.offsets + 1)] == 0).all()
            assert max(batch.layout.lengths[: len(batch.documents)]) <= context
            starts = np.cumsum([0, *batch.layout.lengths])[: len(batch.documents)]
            assert list(batch.documents) == (np.searchsorted(corpus.offsets + 1, tokens[starts], "right") - 1).tolist()
        firsts = set((corpus.offsets + 1).tolist())
        assert seen == dict.fromkeys(range(1, corpus.tokens + 1), epochs * per_step)
        assert learnt == {token: epochs * per_step for token in range(1, corpus.tokens + 1) if token not in firsts}


def test_a_packed_sequence_of_three_documents_has_the_expected_targets(tmp_path: Path) -> None:
    corpus = write_documents(tmp_path, [np.array([1, 2, 3]), np.array([4, 5, 6, 7, 8, 9]), np.array([10, 11])])
    packed = PackedDocuments.pack(corpus, capacity=13, context=4, seed=0)
    batch = packed.sequence(0, 0, 13, synthetic=True)
    segments = zip(batch.tokens.split(batch.layout.lengths), batch.targets.split(batch.layout.lengths), strict=True)
    found = {tuple(tokens.tolist()): targets.tolist() for tokens, targets in segments}
    assert found == {
        (1, 2, 3): [2, 3, NO_TARGET],
        (4, 5, 6, 7): [5, 6, 7, 8],  # the document goes on
        (8, 9): [9, NO_TARGET],
        (10, 11): [11, NO_TARGET],
        (0, 0): [NO_TARGET, NO_TARGET],
    }
    assert batch.layout.lengths[-1] == 2 and (batch.counts.real_tokens, batch.counts.synthetic_tokens) == (0, 11)


def test_an_end_token_inside_a_document_does_not_end_it(tmp_path: Path) -> None:
    document = np.array([3, 5, 1, 5, 1])  # the end token, 1, in the middle too
    batch = PackedDocuments.pack(write_documents(tmp_path, [document, document]), 10, 10, 0).sequence(0, 0, 10, synthetic=False)
    assert batch.layout.lengths == (5, 5)
    assert batch.targets.tolist() == [5, 1, 5, 1, -100] * 2


def test_joint_batches_repeat_no_synthetic_token_and_keep_the_share(tmp_path: Path) -> None:
    real, synthetic = numbered(tmp_path / "real", [30] * 10), numbered(tmp_path / "synthetic", [30] * 8, first=5000)
    settings = ("pretrain={tokens=1280, tokens_per_step=128, microbatch_tokens=64}", "model.context=64")
    for share, expected in ((0.2, 0.2), (0.9, 4 / 20)):  # 240 synthetic tokens make 4 sequences of 64
        batches = corpus_batches(real, configure(tmp_path, *settings, f"arms.sbp.share={share}"), synthetic)
        read = sequences(batches)
        tokens = np.concatenate([batch.tokens.numpy() for batch in read])
        assert max(Counter(tokens[tokens >= 5000].tolist()).values()) == 1
        assert sum(batch.counts.synthetic_tokens for batch in read) == (tokens >= 5000).sum()
        assert sum(batch.counts.real_tokens for batch in read) == ((tokens > 0) & (tokens < 5000)).sum()
        assert batches.synthetic_share == pytest.approx(expected)
    asked = configure(tmp_path, *settings, "arms.sbp={share=0.5, minimum_share=0.5}")
    with pytest.raises(
        UserError, match=r"asks for 640 synthetic tokens, and there are 256.*no synthetic document is read twice"
    ):
        corpus_batches(real, asked, synthetic)


def test_a_step_a_context_and_an_index_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    corpus = numbered(tmp_path / "real", [30])
    with pytest.raises(UserError, match="pretrain: tokens_per_step = 100 is no multiple of microbatch_tokens = 96"):
        corpus_batches(corpus, configure(tmp_path, "pretrain={tokens_per_step=100, microbatch_tokens=96}"))
    with pytest.raises(UserError, match=r"64 is less than model\.context = 96"):
        corpus_batches(corpus, configure(tmp_path, "pretrain={tokens_per_step=128, microbatch_tokens=64}"))
    with pytest.raises(ValueError, match="5 packed sequences a step cannot be divided equally among 2 processes"):
        divide_sequences(5, 2)
    batches = corpus_batches(corpus, configure(tmp_path))
    for step, index in ((-1, 0), (batches.steps, 0), (0, batches.sequences_per_step)):
        with pytest.raises(ValueError, match="of step"):
            batches.sequence(step, index)


@given(st.integers(1, 8), st.integers(1, 8))
def test_divide_sequences_gives_every_sequence_to_one_process(processes: int, each: int) -> None:
    parts = divide_sequences(processes * each, processes)
    assert [number for part in parts for number in part] == list(range(processes * each))
    assert {len(part) for part in parts} == {each} and len(parts) == processes


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
        recipe = TrainConfig(tokens=2 * 100 * capacity, tokens_per_step=2 * capacity, microbatch_tokens=capacity)
        if not wanted:
            with pytest.raises(UserError, match="no partner is within"):
                PairBatches(corpus, pair_set(groups), PARTNER, recipe, CONTEXT, seed=1)
            return
        batches = PairBatches(corpus, pair_set(groups), PARTNER, recipe, CONTEXT, seed=1)
        assert (len(batches.packed.partners), batches.packed.partners_too_long) == (len(wanted), len(pairs) - len(wanted))
        read = sequences(batches, range(batches.packed.packing.bins))  # two sequences a step: two epochs
        assert Counter(pair for batch in read for pair in check_pairs(batch, corpus, capacity)) == dict.fromkeys(wanted, 2)


def check_pairs(batch: PackedBatch, corpus: Corpus, capacity: int) -> list[tuple[int, int]]:
    """The pairs in a batch, every token and target of it checked."""
    check_sequence(batch, capacity)
    segments = [segment.tolist() for segment in batch.tokens.split(batch.layout.lengths)]
    targets = [segment.tolist() for segment in batch.targets.split(batch.layout.lengths)]
    pairs, documents = [], []
    for tokens, goals, parent in zip(segments, targets, batch.layout.parents, strict=True):
        document = int(np.searchsorted(corpus.offsets + 1, tokens[-1], "right")) - 1
        if parent == -1 and tokens[0] == 0:
            continue
        documents.append(document)
        if parent == -1:
            assert tokens == corpus[document][:CONTEXT].tolist()
            assert set(goals) == {NO_TARGET}
        else:
            rest = corpus[document][1:].tolist()
            assert (tokens, goals) == ([PARTNER, *rest], [*rest, NO_TARGET])
            seed = int(np.searchsorted(corpus.offsets + 1, segments[parent][0], "right")) - 1
            pairs.append((seed, document))
    assert documents == list(batch.documents)
    return pairs


def test_a_pair_longer_than_a_packed_sequence_is_refused(tmp_path: Path) -> None:
    corpus, recipe = numbered(tmp_path, [10, 12]), TrainConfig(tokens_per_step=39, microbatch_tokens=39)
    with pytest.raises(UserError, match=r"at least twice model\.context, 40"):
        PairBatches(corpus, pair_set({0: [1]}), PARTNER, recipe, 20, seed=0)
    with pytest.raises(UserError, match=r"no partner is within model\.context = 11"):
        PairBatches(corpus, pair_set({0: [1]}), PARTNER, recipe, 11, seed=0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40), st.integers(40, 90))
def test_split_groups_makes_as_few_groups_as_next_fit(pairs: list[tuple[int, int]], capacity: int) -> None:
    seeds, partners = np.array(sorted(pairs)).T
    lengths = np.array([1, 5, 9, 14, 18, 20])
    starts, sizes = split_groups(seeds, partners, lengths, CONTEXT, capacity)
    assert starts[0] == 0 and starts[-1] == len(pairs)
    for group, (start, stop) in enumerate(pairwise(starts)):
        assert len(set(seeds[start:stop])) == 1
        assert sizes[group] == lengths[seeds[start]] + lengths[partners[start:stop]].sum() <= capacity
        if stop < len(pairs) and seeds[stop] == seeds[start]:
            assert sizes[group] + lengths[partners[stop]] > capacity
