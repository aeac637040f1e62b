"""The order in which training reads its sources: a pure function of the step, the same on any number of processes.

A source is a number of packed sequences of whole documents (see `packing.py`). In every epoch its sequences come in another
order, a keyed permutation, and hold other documents of the same sizes. Sources are mixed by integer error diffusion. Only the
plan is stored: the packed sequence at position g of the run is computed from g alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from sbp_fast.data.permutation import key_of, permute


@dataclass(frozen=True)
class Source:
    """One corpus in the mixture.

    Attributes:
        name: unique among the sources of an order.
        sequences: packed sequences of the whole corpus.
        repeats: whether it may be read more than once.
        share: of all packed sequences; the shares of an order's sources sum to one.
    """

    name: str
    sequences: int
    repeats: bool
    share: Fraction = Fraction(1)


@dataclass(frozen=True)
class SequenceRef:
    """Packed sequence `index` of the named source, in its epoch `epoch` (from 0)."""

    source: str
    epoch: int
    index: int


class Order:
    """The order in which a run of `steps` steps reads its sources.

    In every epoch of a source each of its packed sequences occurs exactly once. Among the first n of the run, for any n, each
    of two sources is within 1/2 of its share of n, each of three within 1, each of k within (k - 1) / 2.

    Args:
        sources: to read.
        sequences_per_step: packed sequences in a step.
        steps: the length of the run.
        seed: of the permutations.

    Attributes:
        budgets: packed sequences read from each source in the whole run.

    Raises:
        ValueError: a name used twice, shares that do not sum to one, an empty source, or one that may not repeat and is
            too small.
    """

    def __init__(self, sources: Sequence[Source], *, sequences_per_step: int, steps: int, seed: int) -> None:
        if len({source.name for source in sources}) < len(sources):
            raise ValueError(f"two sources have one name: {', '.join(source.name for source in sources)}")
        if sum(source.share for source in sources) != 1 or min(source.share for source in sources) < 0:
            shares = ", ".join(f"{source.name} {source.share}" for source in sources)
            raise ValueError(f"the shares of the sources must sum to one: {shares}")
        self.sources, self.sequences_per_step, self.steps, self.seed = tuple(sources), sequences_per_step, steps, seed
        self.budgets = _budgets([source.share for source in sources], steps * sequences_per_step)
        for source, budget in zip(sources, self.budgets, strict=True):
            if budget and not source.sequences:
                raise ValueError(f"source {source.name} holds no tokens")
            if budget > source.sequences and not source.repeats:
                limit = f"which may not repeat and has {source.sequences}"
                raise ValueError(f"the plan reads {budget} packed sequences of {source.name}, {limit}")

    @property
    def epochs(self) -> dict[str, float]:
        """Times that each source is read in the whole run, by its name."""
        pairs = zip(self.sources, self.budgets, strict=True)
        return {source.name: budget / max(source.sequences, 1) for source, budget in pairs}

    def batch(self, step: int) -> list[SequenceRef]:
        """Return what a step reads, in order."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} of a run of {self.steps}")
        first = step * self.sequences_per_step
        return [self.at(g) for g in range(first, first + self.sequences_per_step)]

    def at(self, g: int) -> SequenceRef:
        """Return the packed sequence at position `g` of the run."""
        source_index, earlier = self.source_at(g)
        source = self.sources[source_index]
        epoch, position = divmod(earlier, source.sequences)
        index = permute(position, source.sequences, key_of(self.seed, source_index, epoch))
        return SequenceRef(source.name, epoch, index)

    def source_at(self, g: int) -> tuple[int, int]:
        """Return the index of the source read at position `g` of the run, and how often it was read before."""
        before, after = g, g + 1
        budget = sum(self.budgets)
        for source, mine in enumerate(self.budgets):
            # of the `budget` sequences of this source and the later ones `mine` are its own, evenly spread among them
            own_before, own_after = _spread(before, mine, budget), _spread(after, mine, budget)
            if own_after > own_before:
                return source, own_before
            before, after, budget = before - own_before, after - own_after, budget - mine
        raise IndexError(f"packed sequence {g} of {sum(self.budgets)}")


def _spread(n: int, mine: int, total: int) -> int:
    """Count those of `mine` items evenly spread over `total` that are among the first `n`: n * mine / total, rounded."""
    return (2 * n * mine + total) // (2 * total)


def _budgets(shares: Sequence[Fraction], total: int) -> list[int]:
    """Return whole numbers that sum to `total`, each within one of its share of it."""
    cumulative = [round(sum(shares[: count + 1], Fraction()) * total) for count in range(len(shares))]
    return [high - low for low, high in zip([0, *cumulative], cumulative, strict=False)]
