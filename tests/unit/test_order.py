from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.corpus.order import Order, Source, permute

SEEDS = st.integers(0, 2**63 - 1)


def one_source(tokens: int, window: int, seed: int, epochs: int = 3) -> Order:
    source = Source("real", tokens, repeats=True)
    return Order([source], window=window, windows_per_step=1, steps=epochs * source.windows(window), seed=seed)


def tokens_read(windows: list) -> list[int]:
    return [token for window in windows for token in range(window.start, window.stop)]


@given(tokens=st.integers(1, 300), window=st.integers(1, 40), seed=SEEDS)
def test_every_epoch_reads_every_token_exactly_once(tokens: int, window: int, seed: int) -> None:
    order = one_source(tokens, window, seed)
    for epoch in range(3):
        per_epoch = order.sources[0].windows(window)
        windows = [piece for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for piece in order.windows(step)]
        assert {piece.epoch for piece in windows} == {epoch}
        assert sorted(tokens_read(windows)) == list(range(tokens))


@given(tokens=st.integers(1, 300), window=st.integers(1, 40), seed=SEEDS)
def test_a_step_reads_one_window_of_consecutive_tokens_on_the_ring(tokens: int, window: int, seed: int) -> None:
    order = one_source(tokens, window, seed)
    lengths = Counter()
    for step in range(order.source_windows[0]):
        read = tokens_read(order.windows(step))
        assert all((later - earlier) % tokens in (0, 1) for earlier, later in pairwise(read))
        lengths[len(read)] += 1
    short = tokens % window
    assert lengths == Counter({window: tokens // window}) + Counter([short] if short else [])


def test_epochs_differ_in_cuts_and_in_order() -> None:
    order = one_source(tokens=100_000, window=100, seed=0)
    starts = [[order.windows(epoch * 1000 + step)[0].start for step in range(1000)] for epoch in range(3)]
    assert len({start % 100 for epoch in starts for start in epoch if start}) == 3
    for epoch in starts:
        ranks = sorted(range(1000), key=epoch.__getitem__)
        in_place = sum(later == earlier + 1 for earlier, later in pairwise(ranks))
        assert in_place < 10  # neighbours in the stream are neighbours in the order about once


def test_the_seed_decides_the_order() -> None:
    orders = [[one_source(10_000, 100, seed).windows(step) for step in range(20)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=3),
    steps=st.integers(1, 60),
    windows_per_step=st.integers(1, 5),
    seed=SEEDS,
)
def test_every_prefix_holds_each_source_within_one_of_its_share(
    weights: list[int], steps: int, windows_per_step: int, seed: int
) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    sources = [Source(str(number), 50, True, share) for number, share in enumerate(shares)]
    order = Order(sources, window=8, windows_per_step=windows_per_step, steps=steps, seed=seed)
    total = steps * windows_per_step
    assert sum(order.budgets) == total
    assert all(abs(budget - share * total) <= 1 for budget, share in zip(order.budgets, shares, strict=True))
    limit = Fraction(1, 2) if len(weights) <= 2 else Fraction(1)
    counts = [0] * len(sources)
    for g in range(total):
        source, earlier = order.draw(g)
        assert earlier == counts[source]
        counts[source] += 1
        for count, budget in zip(counts, order.budgets, strict=True):
            assert abs(count - Fraction((g + 1) * budget, total)) <= limit
    assert counts == order.budgets


def test_many_sources_stay_within_the_documented_distance() -> None:
    sources = [Source(str(number), 50, True, Fraction(1, 7)) for number in range(7)]
    order = Order(sources, window=8, windows_per_step=1, steps=700, seed=0)
    counts = [0] * 7
    for g in range(700):
        counts[order.draw(g)[0]] += 1
        assert all(abs(count - Fraction(g + 1, 7)) <= 3 for count in counts)
    assert counts == [100] * 7


@given(real=st.integers(1, 500), synthetic=st.integers(20, 500), seed=SEEDS, data=st.data())
def test_any_step_alone_equals_the_step_in_sequence(real: int, synthetic: int, seed: int, data: st.DataObject) -> None:
    def make(windows_per_step: int, steps: int) -> Order:
        sources = [Source("real", real, True, Fraction(3, 4)), Source("synthetic", synthetic, False, Fraction(1, 4))]
        return Order(sources, window=7, windows_per_step=windows_per_step, steps=steps, seed=seed)

    sequential = [piece for step in range(3) for piece in make(4, 3).windows(step)]
    fresh = make(4, 3)
    steps = data.draw(st.permutations(range(3)))
    by_step = {step: fresh.windows(step) for step in steps}
    assert [piece for step in range(3) for piece in by_step[step]] == sequential
    # the same windows in other steps: a run's batch may be cut up in any way among processes
    assert [piece for step in range(6) for piece in make(2, 6).windows(step)] == sequential


def test_a_source_that_may_not_repeat_is_read_at_most_once_or_refused() -> None:
    def make(steps: int) -> Order:
        sources = [Source("real", 100, True, Fraction(1, 2)), Source("synthetic", 95, False, Fraction(1, 2))]
        return Order(sources, window=10, windows_per_step=2, steps=steps, seed=5)

    order = make(10)
    read = Counter(
        token
        for step in range(10)
        for piece in order.windows(step)
        if piece.source == "synthetic"
        for token in range(piece.start, piece.stop)
    )
    assert read == Counter(range(95))
    assert order.epochs == {"real": 1.0, "synthetic": 1.0}
    with pytest.raises(ValueError, match="reads 11 windows of synthetic, which may not repeat and has 10"):
        make(11)


def test_an_unusable_plan_is_refused() -> None:
    def make(*sources: Source) -> Order:
        return Order(sources, window=10, windows_per_step=2, steps=3, seed=0)

    with pytest.raises(ValueError, match="sum to one: a 1/2"):
        make(Source("a", 10, True, Fraction(1, 2)))
    with pytest.raises(ValueError, match="holds no tokens"):
        make(Source("a", 0, True))
    with pytest.raises(ValueError, match="one name: a, a"):
        make(Source("a", 9, True, Fraction(1, 2)), Source("a", 9, True, Fraction(1, 2)))
    for step in (-1, 3):
        with pytest.raises(ValueError, match="of a run of 3"):
            make(Source("a", 10, True)).windows(step)


def test_the_fingerprint_tells_plans_apart() -> None:
    plans = [
        (100, 10, 2, 3, 0),
        (101, 10, 2, 3, 0),
        (100, 11, 2, 3, 0),
        (100, 10, 3, 3, 0),
        (100, 10, 2, 4, 0),
        (100, 10, 2, 3, 1),
    ]
    prints = [
        Order([Source("a", tokens, True)], window=window, windows_per_step=per_step, steps=steps, seed=seed).fingerprint
        for tokens, window, per_step, steps, seed in plans
    ]
    assert len(set(prints)) == len(plans)
    again = Order([Source("a", 100, True)], window=10, windows_per_step=2, steps=3, seed=0)
    assert again.fingerprint == prints[0]


@given(size=st.integers(1, 400), key=st.tuples(SEEDS, st.integers(0, 3), st.integers(0, 9)))
def test_permute_is_a_permutation(size: int, key: tuple[int, ...]) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_of_a_corpus_too_large_to_list_stays_inside_and_apart() -> None:
    size = 488_000_001
    images = {permute(index, size, (1, 0, 0)) for index in range(2000)}
    assert len(images) == 2000 and max(images) < size and min(images) >= 0
    assert len({image * 16 // size for image in images}) == 16  # spread over the whole range
