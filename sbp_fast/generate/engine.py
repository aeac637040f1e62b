"""Continuous batching in which the samples of a seed share its pages: which document is generated in which row, and when.

A seed is prefilled once, its pages are held by all of its samples, and each sample begins as soon as a row is free. When a
document is finished, the next sample takes its row in the same step. When pages run out, the youngest document is preempted: it
gives its pages back and is generated again later. As each document has its own stream of random numbers, it comes out the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from sbp_fast.generate.decoder import ROW_MULTIPLE, RUNNING, STOPS, Decoder, KVCacheConfig, SamplingParams, StepResult
from sbp_fast.generate.kv_pages import SCRATCH, PagePool
from sbp_fast.generate.rng import document_uniforms
from sbp_fast.model.transformer import Transformer


@dataclass(frozen=True)
class Seed:
    """A seed document and the samples to generate after it.

    Attributes:
        number: identifies the seed in the results.
        document: index into the unique corpus, or NO_SEED; with a sample's number it names the stream of random numbers.
        tokens: int [tokens]; none where documents are generated after no seed.
        samples: numbers of the samples, each once.
        first: token that its documents begin with in this engine; None for `SamplingParams.first`.
    """

    number: int
    document: int
    tokens: np.ndarray
    samples: tuple[int, ...]
    first: int | None = None


@dataclass(frozen=True)
class GenerationResult:
    """A generated document.

    Attributes:
        seed: number of its seed.
        sample: number of the document among its seed's.
        tokens: int32 [tokens], without the tokens that begin and end a document.
        stop: why generation stopped, of `STOPS`.
        log_probability: nats, summed over the generated tokens, under the model at temperature 1 without top-k or top-p.
    """

    seed: int
    sample: int
    tokens: np.ndarray
    stop: str
    log_probability: float

    @property
    def generated_tokens(self) -> int:
        """Number of generated tokens, the end token included."""
        return len(self.tokens) + (self.stop == "end")


@dataclass(eq=False)
class SequenceGroup:
    """A seed in the engine: prefilled once it has pages, in the layout's tables once a sample has a row.

    Attributes:
        waiting: indices into `seed.samples` of the samples without a row.
        pages: pages of the seed's keys and values.
        index: the group's row in the tables of the layout; -1 outside of them.
        rows: batch rows of the samples that have one.
    """

    seed: Seed
    waiting: deque[int]
    pages: list[int] = field(default_factory=list)
    index: int = -1
    rows: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Request:
    """A document that is being generated.

    Attributes:
        sample_index: index into the samples of the group's seed.
        age: increases from request to request; the greatest is the youngest.
        pages: pages of the document's own keys and values.
        steps: decoding steps begun, each of which generates one token.
        tokens: tokens that the host knows; one more may be on its way from the device.
        log_probability: nats, of `tokens`.
    """

    group: SequenceGroup
    sample_index: int
    age: int
    pages: list[int] = field(default_factory=list)
    steps: int = 0
    tokens: list[int] = field(default_factory=list)
    log_probability: float = 0.0


class Engine:
    """Generates documents after seeds.

    Args:
        model: the model, not sharded.
        sampling: how tokens are sampled.
        cache: sizes of the batch and of the cache.
        run_seed: key of the random numbers.
        graphs: on CUDA, capture each size of a step as a graph; not while other threads use the device.

    Raises:
        ValueError: a cache too small for one document.
    """

    def __init__(
        self, model: Transformer, sampling: SamplingParams, cache: KVCacheConfig, run_seed: int, *, graphs: bool = True
    ) -> None:
        least = 1 + cache.pages_of(cache.seed_tokens) + cache.pages_of(sampling.maximum_tokens)
        if cache.pages < least:
            raise ValueError(f"{cache.pages} pages do not hold one seed and one document, which take {least}")
        if cache.rows % ROW_MULTIPLE or cache.prefill_tokens < cache.seed_tokens:
            raise ValueError(f"rows must be a multiple of {ROW_MULTIPLE}, and prefill_tokens hold the longest seed")
        self.sampling, self.cache, self.run_seed = sampling, cache, run_seed
        self.decoder = Decoder(model, sampling, cache, graphs=graphs)
        self.pool = PagePool(cache.pages)
        self.tables = {name: table.cpu().numpy().copy() for name, table in self.decoder.tables.items()}
        self.requests: list[Request | None] = [None] * cache.rows  # by batch row
        self.groups: list[SequenceGroup | None] = [None] * cache.rows  # by row of the tables
        self.ready: deque[SequenceGroup] = deque()  # prefilled, with samples that wait for rows
        self.preempted_groups: deque[SequenceGroup] = deque()  # gave their pages back before all samples were finished
        self.overlap = self.decoder.device.type == "cuda"  # read a step's outputs while the next step runs
        self.size = 0
        self.preemptions = 0
        self._changed_tables: set[str] = set()
        self._started_rows: list[int] = []
        self._freed_rows: list[int] = []
        self._age = 0

    def generate(self, seeds: Iterable[Seed]) -> Iterator[GenerationResult]:
        """Yield a result for every sample of every seed, in the order in which the documents are finished."""
        source = iter(seeds)
        pending: tuple[StepResult, list[Request | None]] | None = None
        while True:
            if not self._fill(source) and self._too_wide():
                if pending is not None:
                    yield from self._collect(*pending)
                    pending = None
                self._shrink()
            if not any(self.requests) and pending is None:
                return
            started = self._step() if any(self.requests) else None
            if pending is not None:
                yield from self._collect(*pending)
            pending = started
            if pending is not None and not self.overlap:
                yield from self._collect(*pending)
                pending = None

    # --- which sample is generated in which row

    def _fill(self, source: Iterator[Seed]) -> bool:
        """Give free rows to waiting samples; return whether more samples may be waiting."""
        free = [row for row, request in enumerate(self.requests) if request is None]
        while free:
            if not self.ready and not self._prefill(source, len(free)):
                break
            group = self.ready[0]
            # every running request may need a page this step, and so does the one that starts
            while free and group.waiting and self.pool.free > self._running():
                self._start(group, free.pop(0))
            if group.waiting:
                break
            self.ready.popleft()
        return bool(self.ready or self.preempted_groups or not free)

    def _running(self) -> int:
        return self.cache.rows - self.requests.count(None)

    def _start(self, group: SequenceGroup, row: int) -> None:
        """Start the next waiting sample of `group` in `row`."""
        if group.index < 0:
            group.index = self.groups.index(None)
            self.groups[group.index] = group
            self._write_pages("seed_pages", group.index, group.pages)
            self.tables["seed_tokens"][group.index] = len(group.seed.tokens)
        sample_index = group.waiting.popleft()
        self._age += 1
        self.requests[row] = Request(group, sample_index, self._age)
        group.rows.add(row)
        self.pool.hold(group.pages)
        self.tables["row_group"][row] = group.index
        self.tables["group_rows"][group.index, sample_index] = row
        self._changed_tables |= {"seed_tokens", "row_group", "group_rows"}
        self._started_rows.append(row)
        self.size = max(self.size, self.decoder.size_for(max(row, group.index) + 1))

    def _write_pages(self, table: str, index: int, pages: list[int]) -> None:
        self.tables[table][index] = SCRATCH
        self.tables[table][index, : len(pages)] = pages
        self._changed_tables.add(table)

    def _prefill(self, source: Iterator[Seed], rows: int) -> bool:
        """Prefill the next seeds, enough for `rows` rows if they fit together; return whether any was prefilled."""
        groups: list[SequenceGroup] = []
        tokens = samples = 0
        while samples < rows:
            group = self.preempted_groups.popleft() if self.preempted_groups else self._next_group(source)
            if group is None:
                break
            length = len(group.seed.tokens)
            needed = self.cache.pages_of(length)
            fits = tokens + length <= self.cache.prefill_tokens and self.pool.free >= needed + self._running() + 1
            if not fits:
                self.preempted_groups.appendleft(group)
                break
            group.pages = self.pool.take(needed)
            groups.append(group)
            tokens, samples = tokens + length, samples + len(group.waiting)
        seeded = [group for group in groups if group.pages]
        if seeded:
            self.decoder.prefill([group.seed.tokens for group in seeded], [group.pages for group in seeded])
        self.ready.extend(groups)
        return bool(groups)

    @staticmethod
    def _next_group(source: Iterator[Seed]) -> SequenceGroup | None:
        seed = next(source, None)
        return None if seed is None else SequenceGroup(seed, deque(range(len(seed.samples))))

    # --- steps

    def _step(self) -> tuple[StepResult, list[Request | None]]:
        """Launch one step of all rows; return its outputs and the requests that they belong to."""
        page = self.cache.page_tokens
        full = [
            (request.age, row, request)
            for row, request in enumerate(self.requests)
            if request is not None
            and request.steps == len(request.pages) * page
            and request.steps < self.sampling.maximum_tokens
        ]
        for _, row, request in sorted(full):  # the oldest first: it always gets its page, so that work goes on
            if self.requests[row] is request:
                self._add_page(row, request)
        for running in self.requests:
            if running is not None:
                running.steps += running.steps < self.sampling.maximum_tokens
        self._send_changes()
        return self.decoder.step(self.size), list(self.requests[: self.size])

    def _add_page(self, row: int, request: Request) -> None:
        """Give a request one more page, preempting the youngest requests if none is free."""
        while self.pool.free == 0:
            self._preempt()
            if self.requests[row] is not request:
                return
        request.pages += self.pool.take(1)
        self._write_pages("own_pages", row, request.pages)

    def _preempt(self) -> None:
        """Free the pages of a seed without running samples, or else of the youngest request."""
        idle = next((group for group in reversed(self.ready) if not group.rows), None)
        if idle is not None:
            self._preempt_group(idle)
            return
        _, row, request = max((request.age, row, request) for row, request in enumerate(self.requests) if request is not None)
        group = request.group
        group.waiting.appendleft(request.sample_index)
        self._free_row(row, request)
        self.preemptions += 1
        if not group.rows:
            self._preempt_group(group)
        elif group not in self.ready:
            self.ready.appendleft(group)

    def _preempt_group(self, group: SequenceGroup) -> None:
        """Free a seed's pages; the seed is prefilled again later."""
        if group in self.ready:
            self.ready.remove(group)
        self._free_group(group)
        self.preempted_groups.appendleft(group)

    def _free_group(self, group: SequenceGroup) -> None:
        self.pool.release(group.pages)
        group.pages = []
        if group.index >= 0:
            self.tables["seed_tokens"][group.index] = 0
            self.groups[group.index] = None
            group.index = -1
            self._changed_tables.add("seed_tokens")

    def _free_row(self, row: int, request: Request) -> None:
        """Free a row and its request's pages."""
        group = request.group
        self.pool.release(request.pages)
        self.pool.release(group.pages)
        group.rows.remove(row)
        self.requests[row] = None
        self.tables["group_rows"][group.index, request.sample_index] = -1
        self._changed_tables.add("group_rows")
        self._freed_rows.append(row)

    def _send_changes(self) -> None:
        """Send what has changed since the last step to the device."""
        if self._freed_rows:
            self.decoder.clear(self._freed_rows)
        if self._started_rows:
            started = [request for row in self._started_rows if (request := self.requests[row]) is not None]
            first = [self._first_token(request.group.seed) for request in started]
            self.decoder.start(self._started_rows, np.array(first), np.stack([self._uniforms(request) for request in started]))
        self.decoder.write_tables({name: self.tables[name] for name in sorted(self._changed_tables)})
        self._freed_rows, self._started_rows, self._changed_tables = [], [], set()

    def _first_token(self, seed: Seed) -> int:
        return self.sampling.first if seed.first is None else seed.first

    def _uniforms(self, request: Request) -> np.ndarray:
        seed = request.group.seed
        sample = seed.samples[request.sample_index]
        return document_uniforms(self.run_seed, seed.document, sample, self.sampling.maximum_tokens)

    def _collect(self, outputs: StepResult, requests: list[Request | None]) -> Iterator[GenerationResult]:
        """Add a step's outputs to its requests; yield the results of the finished ones."""
        tokens, stops, log_probabilities = (values.tolist() for values in outputs.read())
        for row, request in enumerate(requests):
            if request is None or self.requests[row] is not request:  # idle, finished a step ago, or preempted
                continue
            request.tokens.append(tokens[row])
            request.log_probability += log_probabilities[row]
            if stops[row] != RUNNING:
                group = request.group
                self._free_row(row, request)
                if not group.rows and not group.waiting:
                    self._free_group(group)
                yield self._result(request, STOPS[stops[row]])

    @staticmethod
    def _result(request: Request, stop: str) -> GenerationResult:
        seed = request.group.seed
        tokens = np.array(request.tokens[: -1 if stop == "end" else None], np.int32)
        return GenerationResult(seed.number, seed.samples[request.sample_index], tokens, stop, request.log_probability)

    # --- the last documents

    def _too_wide(self) -> bool:
        """Whether fewer rows would hold the running requests."""
        return self.decoder.size_for(self._running()) < self.size

    def _shrink(self) -> None:
        """Move the running requests, when no sample waits, into as few rows as hold them."""
        rows = [row for row, request in enumerate(self.requests) if request is not None]
        self._send_changes()
        self.decoder.move(rows)
        requests = [self.requests[row] for row in rows]
        groups = [group for group in self.groups if group is not None]
        for name in ("seed_pages", "seed_tokens", "group_rows"):
            values = self.tables[name][[group.index for group in groups]]
            self.tables[name][:] = -1 if name == "group_rows" else 0
            self.tables[name][: len(groups)] = values
        self.tables["own_pages"][: len(rows)] = self.tables["own_pages"][rows]
        self.tables["own_pages"][len(rows) :] = SCRATCH
        self.tables["row_group"][:] = 0  # an idle row's entry, too, must name one of the remaining groups
        self.requests[:] = [*requests, *[None] * (self.cache.rows - len(rows))]
        self.groups[:] = [*groups, *[None] * (self.cache.rows - len(groups))]
        for index, group in enumerate(groups):
            group.index, group.rows = index, set()
        for row, request in enumerate(requests):
            assert request is not None
            request.group.rows.add(row)
            self.tables["row_group"][row] = request.group.index
            self.tables["group_rows"][request.group.index, request.sample_index] = row
        self._changed_tables = set(self.tables)
        self.size = self.decoder.size_for(len(rows))
