from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.train.data.order import Order, Source

SEEDS = st.integers(0, 2**63 - 1)


def one_source(sequences: int, seed: int, epochs: int = 3) -> Order:
    return Order([Source("real", sequences, repeats=True)], sequences_per_step=1, steps=epochs * sequences, seed=seed)


@given(sequences=st.integers(1, 300), seed=SEEDS)
def test_every_epoch_reads_every_packed_sequence_exactly_once(sequences: int, seed: int) -> None:
    order = one_source(sequences, seed)
    for epoch in range(3):
        refs = [ref for step in range(epoch * sequences, (epoch + 1) * sequences) for ref in order.batch(step)]
        assert {ref.epoch for ref in refs} == {epoch}
        assert sorted(ref.index for ref in refs) == list(range(sequences))


def test_epochs_differ_in_order() -> None:
    order = one_source(1000, seed=0)
    rows = [[order.at(epoch * 1000 + index).index for index in range(1000)] for epoch in range(3)]
    for row in rows:
        assert sum(later == earlier + 1 for earlier, later in pairwise(row)) < 10  # about once
    assert all(sum(a == b for a, b in zip(rows[x], rows[y], strict=True)) < 10 for x, y in ((0, 1), (1, 2), (0, 2)))


def test_the_seed_decides_the_order() -> None:
    orders = [[one_source(100, seed).batch(step) for step in range(20)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


@given(
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=3),
    steps=st.integers(1, 60),
    sequences_per_step=st.integers(1, 5),
    seed=SEEDS,
)
def test_every_prefix_holds_each_source_within_one_of_its_share(
    weights: list[int], steps: int, sequences_per_step: int, seed: int
) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    sources = [Source(str(number), 50, True, share) for number, share in enumerate(shares)]
    order = Order(sources, sequences_per_step=sequences_per_step, steps=steps, seed=seed)
    total = steps * sequences_per_step
    assert sum(order.budgets) == total
    assert all(abs(budget - share * total) <= 1 for budget, share in zip(order.budgets, shares, strict=True))
    limit = Fraction(1, 2) if len(weights) <= 2 else Fraction(1)
    counts = [0] * len(sources)
    for g in range(total):
        source, earlier = order.source_at(g)
        assert earlier == counts[source]
        counts[source] += 1
        for count, budget in zip(counts, order.budgets, strict=True):
            assert abs(count - Fraction((g + 1) * budget, total)) <= limit
    assert counts == order.budgets


def test_many_sources_stay_within_the_documented_distance() -> None:
    sources = [Source(str(number), 50, True, Fraction(1, 7)) for number in range(7)]
    order = Order(sources, sequences_per_step=1, steps=700, seed=0)
    counts = [0] * 7
    for g in range(700):
        counts[order.source_at(g)[0]] += 1
        assert all(abs(count - Fraction(g + 1, 7)) <= 3 for count in counts)
    assert counts == [100] * 7


@given(real=st.integers(1, 500), synthetic=st.integers(20, 500), seed=SEEDS, data=st.data())
def test_any_step_alone_equals_the_step_in_sequence(real: int, synthetic: int, seed: int, data: st.DataObject) -> None:
    def make(sequences_per_step: int, steps: int) -> Order:
        sources = [Source("real", real, True, Fraction(3, 4)), Source("synthetic", synthetic, False, Fraction(1, 4))]
        return Order(sources, sequences_per_step=sequences_per_step, steps=steps, seed=seed)

    sequential = [ref for step in range(3) for ref in make(4, 3).batch(step)]
    fresh = make(4, 3)
    by_step = {step: fresh.batch(step) for step in data.draw(st.permutations(range(3)))}
    assert [ref for step in range(3) for ref in by_step[step]] == sequential
    # the same sequences in other steps: a run's batch may be divided in any way among processes
    assert [ref for step in range(6) for ref in make(2, 6).batch(step)] == sequential


def test_a_source_that_may_not_repeat_is_read_at_most_once_or_refused() -> None:
    def make(steps: int) -> Order:
        sources = [Source("real", 10, True, Fraction(1, 2)), Source("synthetic", 10, False, Fraction(1, 2))]
        return Order(sources, sequences_per_step=2, steps=steps, seed=5)

    order = make(10)
    read = [ref.index for step in range(10) for ref in order.batch(step) if ref.source == "synthetic"]
    assert sorted(read) == list(range(10))
    assert order.epochs == {"real": 1.0, "synthetic": 1.0}
    with pytest.raises(ValueError, match="reads 11 packed sequences of synthetic, which may not repeat and has 10"):
        make(11)


def test_an_unusable_plan_is_refused() -> None:
    def make(*sources: Source) -> Order:
        return Order(sources, sequences_per_step=2, steps=3, seed=0)

    with pytest.raises(ValueError, match="sum to one: a 1/2"):
        make(Source("a", 10, True, Fraction(1, 2)))
    with pytest.raises(ValueError, match="holds no tokens"):
        make(Source("a", 0, True))
    with pytest.raises(ValueError, match="one name: a, a"):
        make(Source("a", 9, True, Fraction(1, 2)), Source("a", 9, True, Fraction(1, 2)))
    for step in (-1, 3):
        with pytest.raises(ValueError, match="of a run of 3"):
            make(Source("a", 10, True)).batch(step)
