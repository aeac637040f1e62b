"""Which documents are drawn when: continuous batching in which the samples of a seed belong together.

A seed is read once, its pages are held by all of its samples, and each sample begins as soon as a row is free. A row whose
document is over takes the next sample at once. Where pages run out the youngest document gives its own back and is drawn again
later; as it has its own stream of random numbers it comes out the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from sbp_fast.generate.decoder import ROW_MULTIPLE, RUNNING, STOPS, Decoder, Room, SamplingRule, StepResult
from sbp_fast.generate.kv_pages import SCRATCH, PagePool
from sbp_fast.generate.rng import document_uniforms
from sbp_fast.model.transformer import Transformer


@dataclass(frozen=True)
class Seed:
    """A seed and what is to be drawn after it.

    Attributes:
        number: by which its drafts are known.
        document: index into the unique corpus; with the sample's number it names the stream of random numbers.
        tokens: int [tokens], at least one.
        samples: numbers of the samples, each once.
    """

    number: int
    document: int
    tokens: np.ndarray
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Draft:
    """A drawn document.

    Attributes:
        seed: number of its seed.
        sample: its own number.
        tokens: int32 [tokens], without what begins and ends a document.
        stop: of `STOPS`.
        log_probability: nats, of all that was drawn together, under the model at temperature 1 with nothing left out.
    """

    seed: int
    sample: int
    tokens: np.ndarray
    stop: str
    log_probability: float

    @property
    def drawn(self) -> int:
        """Tokens drawn, the one that ended it included."""
        return len(self.tokens) + (self.stop == "end")


@dataclass(eq=False)
class Group:
    """A seed at work: read once its pages are there, in the tables once a sample has a row.

    Attributes:
        waiting: places in `seed.samples` of those without a row.
        rows: rows of those that have one.
    """

    seed: Seed
    waiting: deque[int]
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    rows: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Row:
    """A document being drawn.

    Attributes:
        place: of its sample in the group.
        age: counts up from document to document.
        steps: begun, each of which draws a token.
        drawn: tokens known of; there may be one more on its way.
    """

    group: Group
    place: int
    age: int
    pages: list[int] = field(default_factory=list)
    steps: int = 0
    drawn: list[int] = field(default_factory=list)
    log_probability: float = 0.0


class Engine:
    """Draws documents after seeds.

    Args:
        run_seed: of the random numbers.

    Raises:
        ValueError: a room too small for one document.
    """

    def __init__(self, model: Transformer, rule: SamplingRule, room: Room, run_seed: int) -> None:
        least = 1 + room.pages_of(room.seed_tokens) + room.pages_of(rule.maximum_tokens)
        if room.pages < least:
            raise ValueError(f"{room.pages} pages do not hold one seed and one document, which take {least}")
        if room.rows % ROW_MULTIPLE or room.prefill_tokens < room.seed_tokens:
            raise ValueError(f"rows must be a multiple of {ROW_MULTIPLE}, and prefill_tokens hold the longest seed")
        self.rule, self.room, self.run_seed = rule, room, run_seed
        self.decoder = Decoder(model, rule, room)
        self.pool = PagePool(room.pages)
        self.tables = {name: table.cpu().numpy().copy() for name, table in self.decoder.tables.items()}
        self.rows: list[Row | None] = [None] * room.rows
        self.slots: list[Group | None] = [None] * room.rows
        self.ready: deque[Group] = deque()  # seeds are read, samples wait for rows
        self.again: deque[Group] = deque()  # gave their pages back before all was drawn
        self.ahead = self.decoder.device.type == "cuda"  # what a step told is read while the next one is at work
        self.size = 0
        self.preempted = 0
        self._changed: set[str] = set()
        self._begun: list[int] = []
        self._over: list[int] = []
        self._age = 0

    def draw(self, seeds: Iterable[Seed]) -> Iterator[Draft]:
        """Draw every sample of every seed; drafts come in the order in which they are over."""
        source = iter(seeds)
        told: tuple[StepResult, list[Row | None]] | None = None
        while True:
            if not self._fill(source) and self._too_wide():
                if told is not None:
                    yield from self._collect(*told)
                    told = None
                self._shrink()
            if not any(self.rows) and told is None:
                return
            begun = self._step() if any(self.rows) else None
            if told is not None:
                yield from self._collect(*told)
            told = begun
            if told is not None and not self.ahead:
                yield from self._collect(*told)
                told = None

    # --- which sample draws in which row

    def _fill(self, source: Iterator[Seed]) -> bool:
        """Give free rows to waiting samples; whether there may be more of them."""
        free = [row for row, held in enumerate(self.rows) if held is None]
        while free:
            if not self.ready and not self._read_seeds(source, len(free)):
                break
            group = self.ready[0]
            while free and group.waiting and self.pool.free > self._live():  # so that what begins has its page this step
                self._begin(group, free.pop(0))
            if group.waiting:
                break
            self.ready.popleft()
        return bool(self.ready or self.again or not free)

    def _live(self) -> int:
        return self.room.rows - self.rows.count(None)

    def _begin(self, group: Group, row: int) -> None:
        """Let the next waiting sample of `group` begin in `row`."""
        if group.slot < 0:
            group.slot = self.slots.index(None)
            self.slots[group.slot] = group
            self._write("seed_pages", group.slot, group.pages)
            self.tables["seed_tokens"][group.slot] = len(group.seed.tokens)
        place = group.waiting.popleft()
        self._age += 1
        self.rows[row] = Row(group, place, self._age)
        group.rows.add(row)
        self.pool.hold(group.pages)
        self.tables["row_group"][row] = group.slot
        self.tables["group_rows"][group.slot, place] = row
        self._changed |= {"seed_tokens", "row_group", "group_rows"}
        self._begun.append(row)
        self.size = max(self.size, self.decoder.size_for(max(row, group.slot) + 1))

    def _write(self, table: str, index: int, pages: list[int]) -> None:
        self.tables[table][index] = SCRATCH
        self.tables[table][index, : len(pages)] = pages
        self._changed.add(table)

    def _read_seeds(self, source: Iterator[Seed], rows: int) -> bool:
        """Read the next seeds, enough for so many rows if they fit together; whether any was read."""
        groups: list[Group] = []
        tokens = samples = 0
        while samples < rows:
            group = self.again.popleft() if self.again else self._next(source)
            if group is None:
                break
            length = len(group.seed.tokens)
            needed = self.room.pages_of(length)
            fits = tokens + length <= self.room.prefill_tokens and self.pool.free >= needed + self._live() + 1
            if not fits:
                self.again.appendleft(group)
                break
            group.pages = self.pool.take(needed)
            groups.append(group)
            tokens, samples = tokens + length, samples + len(group.waiting)
        if groups:
            self.decoder.prefill([group.seed.tokens for group in groups], [group.pages for group in groups])
            self.ready.extend(groups)
        return bool(groups)

    @staticmethod
    def _next(source: Iterator[Seed]) -> Group | None:
        seed = next(source, None)
        return None if seed is None else Group(seed, deque(range(len(seed.samples))))

    # --- steps

    def _step(self) -> tuple[StepResult, list[Row | None]]:
        """Begin one step of all rows."""
        page = self.room.page_tokens
        full = [
            (held.age, row, held)
            for row, held in enumerate(self.rows)
            if held is not None and held.steps == len(held.pages) * page and held.steps < self.rule.maximum_tokens
        ]
        for _, row, needy in sorted(full):  # the oldest first: it always gets its page, so that work goes on
            if self.rows[row] is needy:
                self._grow(row, needy)
        for held in self.rows:
            if held is not None:
                held.steps += held.steps < self.rule.maximum_tokens
        self._send()
        return self.decoder.step(self.size), list(self.rows[: self.size])

    def _grow(self, row: int, held: Row) -> None:
        """One more page for a row, taken from the youngest document if it must be."""
        while self.pool.free == 0:
            self._give_back()
            if self.rows[row] is not held:
                return
        held.pages += self.pool.take(1)
        self._write("own_pages", row, held.pages)

    def _give_back(self) -> None:
        """Free pages: those of a seed no document of which has begun, else the youngest document's."""
        idle = next((group for group in reversed(self.ready) if not group.rows), None)
        if idle is not None:
            self._forget(idle)
            return
        _, row, held = max((held.age, row, held) for row, held in enumerate(self.rows) if held is not None)
        group = held.group
        group.waiting.appendleft(held.place)
        self._end(row, held)
        self.preempted += 1
        if not group.rows:
            self._forget(group)
        elif group not in self.ready:
            self.ready.appendleft(group)

    def _forget(self, group: Group) -> None:
        """Give a seed's pages back; it is read again later."""
        if group in self.ready:
            self.ready.remove(group)
        self._leave(group)
        self.again.appendleft(group)

    def _leave(self, group: Group) -> None:
        self.pool.release(group.pages)
        group.pages = []
        if group.slot >= 0:
            self.tables["seed_tokens"][group.slot] = 0
            self.slots[group.slot] = None
            group.slot = -1
            self._changed.add("seed_tokens")

    def _end(self, row: int, held: Row) -> None:
        """Free a row and its pages."""
        group = held.group
        self.pool.release(held.pages)
        self.pool.release(group.pages)
        group.rows.remove(row)
        self.rows[row] = None
        self.tables["group_rows"][group.slot, held.place] = -1
        self._changed.add("group_rows")
        self._over.append(row)

    def _send(self) -> None:
        """Tell the device what has changed since the last step."""
        if self._over:
            self.decoder.clear(self._over)
        if self._begun:
            held = [self.rows[row] for row in self._begun]
            streams = [self._uniforms(one) for one in held if one is not None]
            self.decoder.start(self._begun, np.stack(streams))
        self.decoder.write_tables({name: self.tables[name] for name in sorted(self._changed)})
        self._over, self._begun, self._changed = [], [], set()

    def _uniforms(self, held: Row) -> np.ndarray:
        seed = held.group.seed
        return document_uniforms(self.run_seed, seed.document, seed.samples[held.place], self.rule.maximum_tokens)

    def _collect(self, told: StepResult, rows: list[Row | None]) -> Iterator[Draft]:
        """Take in what a step of these documents told; drafts of those that are over."""
        tokens, stops, log_probabilities = (values.tolist() for values in told.read())
        for row, held in enumerate(rows):
            if held is None or self.rows[row] is not held:  # idle, over a step ago, or to be drawn again
                continue
            held.drawn.append(tokens[row])
            held.log_probability += log_probabilities[row]
            if stops[row] != RUNNING:
                group = held.group
                self._end(row, held)
                if not group.rows and not group.waiting:
                    self._leave(group)
                yield self._draft(held, STOPS[stops[row]])

    @staticmethod
    def _draft(held: Row, stop: str) -> Draft:
        seed = held.group.seed
        tokens = np.array(held.drawn[: -1 if stop == "end" else None], np.int32)
        return Draft(seed.number, seed.samples[held.place], tokens, stop, held.log_probability)

    # --- the end of the work

    def _too_wide(self) -> bool:
        """Whether fewer rows would hold the documents at work."""
        return self.decoder.size_for(self._live()) < self.size

    def _shrink(self) -> None:
        """Bring the documents left, when no sample waits, into as few rows as hold them."""
        left = [row for row, held in enumerate(self.rows) if held is not None]
        self._send()
        self.decoder.move(left)
        held = [self.rows[row] for row in left]
        groups = [group for group in self.slots if group is not None]
        for name in ("seed_pages", "seed_tokens", "group_rows"):
            values = self.tables[name][[group.slot for group in groups]]
            self.tables[name][:] = -1 if name == "group_rows" else 0
            self.tables[name][: len(groups)] = values
        self.tables["own_pages"][: len(left)] = self.tables["own_pages"][left]
        self.tables["own_pages"][len(left) :] = SCRATCH
        self.tables["row_group"][:] = 0  # of an idle row as well it must be one of the groups that are left
        self.rows[:] = [*held, *[None] * (self.room.rows - len(left))]
        self.slots[:] = [*groups, *[None] * (self.room.rows - len(groups))]
        for slot, group in enumerate(groups):
            group.slot, group.rows = slot, set()
        for row, one in enumerate(held):
            assert one is not None
            one.group.rows.add(row)
            self.tables["row_group"][row] = one.group.slot
            self.tables["group_rows"][one.group.slot, one.place] = row
        self._changed = set(self.tables)
        self.size = self.decoder.size_for(len(left))
