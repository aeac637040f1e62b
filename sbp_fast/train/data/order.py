"""What training reads when: a pure function of the step, the same on any number of processes.

A source is a number of streams, packed full of whole documents (see `packing.py`). In every epoch its streams come in another
order, a keyed permutation, and hold other documents of the same sizes. Sources mix by integer error diffusion. Nothing is
stored but the plan: stream number g of the run is computed from g alone.
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
        name: its own among the sources of an order.
        streams: in the whole corpus.
        repeats: whether it may be read more than once.
        share: of all streams; the shares of an order's sources sum to one.
    """

    name: str
    streams: int
    repeats: bool
    share: Fraction = Fraction(1)


@dataclass(frozen=True)
class Draw:
    """Stream number `stream` of the named source, in its pass number `epoch` (from 0)."""

    source: str
    epoch: int
    stream: int


class Order:
    """The order in which a run of `steps` steps reads its sources.

    In every epoch of a source each of its streams occurs exactly once. Among the first n streams of the run, for any n,
    each of two sources is within 1/2 of its share of n, each of three within 1, each of k within (k - 1) / 2.

    Args:
        sources: what is read.
        streams_per_step: in a step.
        steps: the length of the run.
        seed: of the permutations.

    Attributes:
        budgets: streams read from each source in the whole run.
        epochs: how often each source is read through.

    Raises:
        ValueError: a name used twice, shares that do not sum to one, an empty source, or one that may not repeat and is
            too small.
    """

    def __init__(self, sources: Sequence[Source], *, streams_per_step: int, steps: int, seed: int) -> None:
        if len({source.name for source in sources}) < len(sources):
            raise ValueError(f"two sources have one name: {', '.join(source.name for source in sources)}")
        if sum(source.share for source in sources) != 1 or min(source.share for source in sources) < 0:
            shares = ", ".join(f"{source.name} {source.share}" for source in sources)
            raise ValueError(f"the shares of the sources must sum to one: {shares}")
        self.sources, self.streams_per_step, self.steps, self.seed = tuple(sources), streams_per_step, steps, seed
        self.budgets = _budgets([source.share for source in sources], steps * streams_per_step)
        for source, budget in zip(sources, self.budgets, strict=True):
            if budget and not source.streams:
                raise ValueError(f"source {source.name} holds no tokens")
            if budget > source.streams and not source.repeats:
                found = f"which may not repeat and has {source.streams}"
                raise ValueError(f"the plan reads {budget} streams of {source.name}, {found}")

    @property
    def epochs(self) -> dict[str, float]:
        pairs = zip(self.sources, self.budgets, strict=True)
        return {source.name: budget / max(source.streams, 1) for source, budget in pairs}

    def batch(self, step: int) -> list[Draw]:
        """What step `step` reads, in order."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} of a run of {self.steps}")
        first = step * self.streams_per_step
        return [self.draw(g) for g in range(first, first + self.streams_per_step)]

    def draw(self, g: int) -> Draw:
        """Stream number `g` of the run."""
        number, earlier = self.turn(g)
        source = self.sources[number]
        epoch, index = divmod(earlier, source.streams)
        return Draw(source.name, epoch, permute(index, source.streams, key_of(self.seed, number, epoch)))

    def turn(self, g: int) -> tuple[int, int]:
        """Which source stream number `g` of the run comes from, and how many earlier ones did."""
        before, after = g, g + 1
        budget = sum(self.budgets)
        for source, mine in enumerate(self.budgets):
            # of `budget` streams left to this source and the later ones `mine` are its own, evenly spread among them
            own_before, own_after = _spread(before, mine, budget), _spread(after, mine, budget)
            if own_after > own_before:
                return source, own_before
            before, after, budget = before - own_before, after - own_after, budget - mine
        raise IndexError(f"stream {g} of {sum(self.budgets)}")


def _spread(n: int, mine: int, total: int) -> int:
    """How many of the first `n` of `total` streams are among `mine` evenly spread ones: n * mine / total, rounded."""
    return (2 * n * mine + total) // (2 * total)


def _budgets(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its share of it."""
    cumulative = [round(sum(shares[: count + 1], Fraction()) * total) for count in range(len(shares))]
    return [high - low for low, high in zip([0, *cumulative], cumulative, strict=False)]
