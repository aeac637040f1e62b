"""What training reads when: a pure function of the step, the same on any number of processes.

The token stream of a source is cut into windows. Each epoch cuts it at other places, because it starts at another token
of the stream (which closes into a ring), and reads the windows in another order, a keyed permutation. Sources mix by
integer error diffusion. Nothing is stored but the plan: window number g is computed from g alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction

import xxhash

from sbp_fast.files import hash_value

ROUNDS = 4


@dataclass(frozen=True)
class Source:
    """One corpus in the mixture.

    Attributes:
        name: its own among the sources of an order.
        tokens: in the whole corpus.
        repeats: whether it may be read more than once.
        share: of all windows; the shares of an order's sources sum to one.
    """

    name: str
    tokens: int
    repeats: bool
    share: Fraction = Fraction(1)

    def windows(self, window: int) -> int:
        """Windows in one epoch; the last may be short."""
        return -(-self.tokens // window)


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) of the named source's stream, read in its pass number `epoch` (from 0)."""

    source: str
    start: int
    stop: int
    epoch: int


class Order:
    """The order in which a run of `steps` steps reads its sources.

    In every epoch of a source each of its tokens occurs exactly once. Among the first n windows of the run, for any n,
    each of two sources is within 1/2 of its share of n, each of three within 1, each of k within (k - 1) / 2.

    A source of w windows has one that is short (tokens % window), so the step that it falls into has fewer valid tokens.

    Args:
        sources: what is read.
        window: tokens in a window.
        windows_per_step: windows in a step.
        steps: the length of the run.
        seed: of shifts and permutations.

    Attributes:
        budgets: windows read from each source in the whole run.
        epochs: how often each source is read through, as a fraction of its windows.
        fingerprint: equal for two orders that read the same.

    Raises:
        ValueError: a name used twice, shares that do not sum to one, an empty source, or one that may not repeat and is
            too small.
    """

    def __init__(self, sources: Sequence[Source], *, window: int, windows_per_step: int, steps: int, seed: int) -> None:
        if len({source.name for source in sources}) < len(sources):
            raise ValueError(f"two sources have one name: {', '.join(source.name for source in sources)}")
        if sum(source.share for source in sources) != 1 or min(source.share for source in sources) < 0:
            shares = ", ".join(f"{source.name} {source.share}" for source in sources)
            raise ValueError(f"the shares of the sources must sum to one: {shares}")
        self.sources, self.window, self.windows_per_step = tuple(sources), window, windows_per_step
        self.steps, self.seed = steps, seed
        self.budgets = _budgets([source.share for source in sources], steps * windows_per_step)
        self.source_windows = [source.windows(window) for source in sources]
        for source, budget, available in zip(sources, self.budgets, self.source_windows, strict=True):
            if budget and not available:
                raise ValueError(f"source {source.name} holds no tokens")
            if budget > available and not source.repeats:
                raise ValueError(f"the plan reads {budget} windows of {source.name}, which may not repeat and has {available}")
        plan = [{**asdict(source), "share": str(source.share)} for source in sources]
        self.fingerprint = hash_value([plan, window, windows_per_step, steps, seed])

    @property
    def epochs(self) -> dict[str, float]:
        pairs = zip(self.sources, self.budgets, self.source_windows, strict=True)
        return {source.name: budget / max(available, 1) for source, budget, available in pairs}

    def windows(self, step: int) -> list[Window]:
        """What step `step` reads, in order. A window across the end of a stream comes as two, its end and its beginning."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step {step} of a run of {self.steps}")
        first = step * self.windows_per_step
        return [piece for g in range(first, first + self.windows_per_step) for piece in self.window_at(g)]

    def window_at(self, g: int) -> list[Window]:
        """The one or two pieces of window number `g` of the run."""
        source, draw = self.draw(g)
        epoch, index = divmod(draw, self.source_windows[source])
        tokens, key = self.sources[source].tokens, (self.seed, source, epoch)
        position = permute(index, self.source_windows[source], key) * self.window
        length = min(self.window, tokens - position)
        start = (position + _hash(*key) % tokens) % tokens
        before_end = min(length, tokens - start)
        name = self.sources[source].name
        pieces = [Window(name, start, start + before_end, epoch)]
        return pieces if before_end == length else [*pieces, Window(name, 0, length - before_end, epoch)]

    def draw(self, g: int) -> tuple[int, int]:
        """Which source window number `g` of the run comes from, and how many earlier ones did."""
        before, after = g, g + 1
        budget = sum(self.budgets)
        for source, mine in enumerate(self.budgets):
            # of `budget` windows left to this source and the later ones `mine` are its own, evenly spread among them
            own_before, own_after = _spread(before, mine, budget), _spread(after, mine, budget)
            if own_after > own_before:
                return source, own_before
            before, after, budget = before - own_before, after - own_after, budget - mine
        raise IndexError(f"window {g} of {sum(self.budgets)}")


def permute(index: int, size: int, key: tuple[int, ...]) -> int:
    """Where a keyed permutation of range(size) takes `index`: a Feistel network over the next power of four.

    Results beyond `size` walk on until they are inside (Black and Rogaway 2002), fewer than four steps on average.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(ROUNDS):
            left, right = right, left ^ (_hash(*key, number, right) & mask)
        index = left << half | right
        if index < size:
            return index


def _spread(n: int, mine: int, total: int) -> int:
    """How many of the first `n` of `total` windows are among `mine` evenly spread ones: n * mine / total, rounded."""
    return (2 * n * mine + total) // (2 * total)


def _budgets(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each within one of its share of it."""
    cumulative = [round(sum(shares[: count + 1], Fraction()) * total) for count in range(len(shares))]
    return [high - low for low, high in zip([0, *cumulative], cumulative, strict=False)]


def _hash(*values: int) -> int:
    return xxhash.xxh3_64_intdigest(b"".join(value.to_bytes(8, "little", signed=True) for value in values))
