"""What generation computes: seeds into pages of keys and values, and one token for every row a step.

All state of a step lies on the device in tensors of fixed shapes: a step reads the token of each row, appends its keys and
values to the row's pages, draws the next token and says which documents are over. It waits for nothing and tells the host by
a copy that is read later. On CUDA it is a graph for each size.

Tensor suffixes besides those of the model: B rows of a step, T tokens of a document at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from sbp_kernels import PackedLayout, packed_attention, repeats, sample_tokens
from sbp_kernels.decode import DecodeLayout, append_to_pages, decode_attention, write_to_pages
from torch import Tensor

from sbp_fast.model.transformer import Block, Transformer

ROW_MULTIPLE = 16
"""Products of so many rows, or a multiple, give a row the same bits on the CPU whatever the other rows are (docs/log.md)."""

RUNNING, END, LENGTH, REPETITION = range(4)
STOPS = ("", "end", "length", "repetition")
"""Why a document is over: it came to its end, to the longest length allowed, or began to repeat itself."""


@dataclass(frozen=True)
class SamplingRule:
    """How documents are drawn and where they stop.

    Attributes:
        first: token id that begins a document, after its seed.
        end: token id that finishes one.
        forbidden: token ids that are never drawn.
        maximum_tokens: drawn for a document at most, `end` included.
        temperature: 0 takes the most probable token.
        top_p, top_k: see `sbp_kernels.sample_tokens`.
        repeated_tokens: a document whose last so many tokens have occurred in it before is over (0: never).
    """

    first: int
    end: int
    forbidden: tuple[int, ...]
    maximum_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repeated_tokens: int = 0


@dataclass(frozen=True)
class Room:
    """How much is drawn together.

    Attributes:
        rows: documents drawn at once, a multiple of ROW_MULTIPLE.
        group: most samples of a seed.
        pages: of keys and values, the scratch page included.
        page_tokens: a power of two.
        seed_tokens: longest seed.
        prefill_tokens: of seeds that are read together; at least the longest seed.
        precision: of keys and values: a name of a torch dtype.
    """

    rows: int
    group: int
    pages: int
    page_tokens: int
    seed_tokens: int
    prefill_tokens: int
    precision: str = "float32"

    def pages_of(self, tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-tokens // self.page_tokens)


class StepResult:
    """What a step told of each row, perhaps still on its way."""

    def __init__(self, told: Tensor) -> None:
        self._event = None
        if told.is_cuda:
            self._told = torch.empty(told.shape, dtype=told.dtype, pin_memory=True).copy_(told, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._told = told.clone()

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens int32, stops int32 and log-probabilities float32, each [B]; waits until they have come."""
        if self._event is not None:
            self._event.synchronize()
        tokens, stops, log_probabilities = self._told.numpy()
        return tokens, stops, log_probabilities.view(np.float32)


class Decoder:
    """A model, its pages, and the rows that it draws.

    The tables of the layout are written by whoever decides which row draws what (`write_tables`, `start`, `clear`).
    """

    def __init__(self, model: Transformer, rule: SamplingRule, room: Room) -> None:
        self.model, self.rule, self.room, self.device = model, rule, room, model.device
        self.blocks = cast(list[Block], list(model.layers))
        shape, rows, longest = model.config, room.rows, rule.maximum_tokens
        pages = (room.pages, shape.kv_heads, room.page_tokens, shape.head_dim)
        dtype = getattr(torch, room.precision)
        # memory that is never written is never taken from a CPU's system
        self.cache = [
            (torch.empty(pages, dtype=dtype, device=self.device), torch.empty(pages, dtype=dtype, device=self.device))
            for _ in self.blocks
        ]

        def integers(*sizes: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(sizes, fill, dtype=dtype, device=self.device)

        self.tables = {
            "seed_pages": integers(rows, room.pages_of(room.seed_tokens)),
            "seed_tokens": integers(rows),
            "group_rows": integers(rows, room.group, fill=-1),
            "row_group": integers(rows),
            "own_pages": integers(rows, room.pages_of(longest)),
        }
        self.own_tokens = integers(rows)
        self.live = integers(rows)
        self.tokens = integers(rows, dtype=torch.int64)
        self.drawn = integers(rows, longest)
        self.runs = integers(rows, longest, dtype=torch.int16)
        self.uniforms = torch.zeros(rows, longest, dtype=torch.float64, device=self.device)
        self.told = integers(3, rows)
        self.forbidden = torch.tensor(rule.forbidden, dtype=torch.int64, device=self.device)
        self._state = (self.tokens, self.own_tokens, self.live, self.uniforms, self.drawn, self.runs)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @torch.inference_mode()
    def prefill(self, seeds: Sequence[np.ndarray], pages: Sequence[Sequence[int]]) -> None:
        """Read seeds, all in one stream, and write their keys and values to the pages that they were given."""
        lengths = [len(seed) for seed in seeds]
        padding = -sum(lengths) % ROW_MULTIPLE
        layout = PackedLayout.from_lengths([*lengths, padding] if padding else lengths).to(self.device)
        tokens = np.concatenate([*seeds, np.zeros(padding, np.int64)]).astype(np.int64)
        place = self.place(pages, lengths)
        x_TW = self.model.embed_tokens(self._send(tokens))
        for number, (block, (keys, values)) in enumerate(zip(self.blocks, self.cache, strict=True)):
            q_THD, k_TKD, v_TKD = block.self_attn.project(block.input_layernorm(x_TW), layout.positions)
            write_to_pages(keys, values, k_TKD[: sum(lengths)], v_TKD[: sum(lengths)], *place)
            if number + 1 < len(self.blocks):  # nothing reads the last layer's output
                x_TW = x_TW + block.self_attn.output(packed_attention(q_THD, k_TKD, v_TKD, layout))
                x_TW = x_TW + block.mlp(block.post_attention_layernorm(x_TW))

    def place(self, pages: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The page of each token of the seeds, and its place there."""
        width = self.room.page_tokens
        page = np.concatenate([np.repeat(own, width)[:length] for own, length in zip(pages, lengths, strict=True)])
        offset = np.concatenate([np.arange(length) % width for length in lengths])
        return self._send(page.astype(np.int64)), self._send(offset)

    def _send(self, values: np.ndarray) -> Tensor:
        """A copy on the device, on its way there while the host goes on."""
        found = torch.from_numpy(values)
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found

    @torch.inference_mode()
    def write_tables(self, tables: dict[str, np.ndarray]) -> None:
        """Replace tables of the layout, by name."""
        for name, values in tables.items():
            self.tables[name].copy_(self._send(values.copy()), non_blocking=True)

    @torch.inference_mode()
    def start(self, rows: Sequence[int], uniforms: np.ndarray) -> None:
        """Begin a document in each of `rows`, drawn by the uniforms float64 [rows, T]."""
        rows_B = self._send(np.array(rows, np.int64))
        self.tokens[rows_B], self.own_tokens[rows_B], self.live[rows_B] = self.rule.first, 0, 1
        self.uniforms[rows_B] = self._send(uniforms)

    @torch.inference_mode()
    def clear(self, rows: Sequence[int]) -> None:
        """Make rows idle."""
        rows_B = self._send(np.array(rows, np.int64))
        self.own_tokens[rows_B], self.live[rows_B] = 0, 0

    @torch.inference_mode()
    def move(self, rows: Sequence[int]) -> None:
        """Bring `rows` to the front, in this order; every other row becomes idle. The tables are not touched."""
        rows_B = self._send(np.array(rows, np.int64))
        for state in self._state:
            state[: len(rows)] = state[rows_B]
        self.own_tokens[len(rows) :], self.live[len(rows) :] = 0, 0

    def size_for(self, rows: int) -> int:
        """The size of a step that so many rows take: on CUDA few sizes, as each has a graph."""
        size = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
        if self.device.type == "cuda":
            size = ROW_MULTIPLE * 2 ** (size // ROW_MULTIPLE - 1).bit_length()
        return min(size, self.room.rows)

    @torch.inference_mode()
    def step(self, size: int) -> StepResult:
        """Draw one token in each of the first `size` rows that has a document."""
        if self.device.type != "cuda":
            self._advance(size)
        else:
            if size not in self._graphs:
                self._graphs[size] = self._capture(size)
            self._graphs[size].replay()
        return StepResult(self.told[:, :size])

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """Record a step. A step of idle rows beforehand compiles the kernels and makes what libraries work in."""
        before = [state.clone() for state in self._state]
        self.own_tokens.zero_()
        self.live.zero_()
        self._advance(size)
        for state, value in zip(self._state, before, strict=True):
            state.copy_(value)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):  # one pool: the graphs never run side by side
            self._advance(size)
        return graph

    def _advance(self, size: int) -> None:
        layout = DecodeLayout(**{name: table[:size] for name, table in self.tables.items()}, own_tokens=self.own_tokens[:size])
        live_B, own_B, tokens_B = self.live[:size], self.own_tokens[:size], self.tokens[:size]
        own_B += live_B
        logits_BV = self.logits(tokens_B, layout)
        newest_B1 = (own_B - 1).clamp(min=0).long().unsqueeze(1)
        drawn_B, log_probabilities_B = sample_tokens(
            logits_BV,
            self.uniforms[:size].gather(1, newest_B1).squeeze(1),
            temperature=self.rule.temperature,
            top_p=self.rule.top_p,
            top_k=self.rule.top_k,
            forbidden=self.forbidden,
        )
        stops_B = self._record(size, newest_B1, drawn_B)
        tokens_B.copy_(drawn_B)
        self.told[0, :size], self.told[1, :size] = drawn_B, stops_B
        self.told[2, :size] = log_probabilities_B.view(torch.int32)
        live_B *= stops_B == RUNNING

    def logits(self, tokens_B: Tensor, layout: DecodeLayout) -> Tensor:
        """Append one token to each row; float32 [B, V] of what comes next."""
        positions_B = layout.positions
        x_BW = self.model.embed_tokens(tokens_B)
        for block, (keys, values) in zip(self.blocks, self.cache, strict=True):
            q_BHD, k_BKD, v_BKD = block.self_attn.project(block.input_layernorm(x_BW), positions_B)
            append_to_pages(keys, values, k_BKD, v_BKD, layout)
            x_BW = x_BW + block.self_attn.output(decode_attention(q_BHD, keys, values, layout))
            x_BW = x_BW + block.mlp(block.post_attention_layernorm(x_BW))
        return self.model.logits(self.model.norm(x_BW)).float()

    def _record(self, size: int, newest_B1: Tensor, drawn_B: Tensor) -> Tensor:
        """Write down what was drawn; why each row is over now, RUNNING where it goes on. int32 [B]"""
        drawn_BT, own_B = self.drawn[:size], self.own_tokens[:size]
        drawn_BT.scatter_(1, newest_B1, drawn_B.unsqueeze(1).int())
        stops_B = torch.where(own_B >= self.rule.maximum_tokens, LENGTH, RUNNING)
        if self.rule.repeated_tokens:
            repeated_B = repeats(self.runs[:size], drawn_BT, own_B, self.rule.repeated_tokens)
            stops_B = torch.where(repeated_B, REPETITION, stops_B)
        return torch.where(drawn_B == self.rule.end, END, stops_B).int()
