"""The computation of generation: seeds are prefilled into pages of keys and values, and each step decodes one token a row.

All state of a step lies on the device in tensors of fixed shapes: a step reads the token of each row, appends its keys and
values to the row's pages, samples the next token and decides which documents are finished. A step makes no host-device
synchronisation: its outputs reach the host by a copy that is read later. On CUDA a step is one graph for each size.

Tensor suffixes besides those of the model: B rows of a step, T tokens of a document at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from sbp_kernels import PackedLayout, packed_attention, repeats, sample_tokens
from sbp_kernels.decode import DecodeLayout, append_to_pages, decode_attention, write_to_pages
from torch import Tensor

from sbp_fast.model.transformer import Block, Transformer

ROW_MULTIPLE = 16
"""Products whose number of rows is a multiple of this give a row the same bits on the CPU, whatever the other rows hold
(docs/log.md)."""

PAGE_TOKENS = 64
PREFILL_TOKENS = 8192
"""Seeds of so many tokens are prefilled together, or a longer one alone."""

RUNNING, END, LENGTH, REPETITION = range(4)
STOPS = ("", "end", "length", "repetition")
"""Why generation of a document stopped: its end token, the maximum length, or a repetition."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled, and when a document stops.

    Attributes:
        first: token id that begins a document, after its seed.
        end: token id that ends a document.
        forbidden: token ids that are never sampled.
        maximum_tokens: most tokens of a document, `end` included.
        temperature: 0 takes the most probable token.
        top_p, top_k: see `sbp_kernels.sample_tokens`.
        repeated_tokens: stop a document when its last `repeated_tokens` tokens have occurred in it before (0: never).
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
class KVCacheConfig:
    """Sizes of the batch and of the paged cache of keys and values.

    Attributes:
        rows: documents generated at once, a multiple of ROW_MULTIPLE.
        samples_per_seed: most samples of one seed.
        pages: pages of keys and values, the scratch page included.
        page_tokens: tokens of a page, a power of two.
        seed_tokens: tokens of the longest seed.
        prefill_tokens: most tokens of the seeds prefilled together; at least `seed_tokens`.
        precision: name of the torch dtype of keys and values.
    """

    rows: int
    samples_per_seed: int
    pages: int
    page_tokens: int
    seed_tokens: int
    prefill_tokens: int
    precision: str = "float32"

    @classmethod
    def for_rows(cls, rows: int, seed_tokens: int, maximum_tokens: int, precision: str) -> KVCacheConfig:
        """Return sizes for documents of one sample a seed, with pages for the longest seed and document in every row.

        Args:
            rows: least number of documents generated at once.
            seed_tokens: tokens of the longest seed.
            maximum_tokens: most tokens of a document.
            precision: name of the torch dtype of keys and values.
        """
        rows = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
        cache = cls(rows, 1, 0, PAGE_TOKENS, seed_tokens, max(PREFILL_TOKENS, seed_tokens), precision)
        return replace(cache, pages=1 + rows * (cache.pages_of(seed_tokens) + cache.pages_of(maximum_tokens)))

    def pages_of(self, tokens: int) -> int:
        """Return how many pages hold `tokens` tokens."""
        return -(-tokens // self.page_tokens)


class StepResult:
    """A step's token, stop and log-probability of each row, perhaps still on their way to the host.

    Args:
        outputs: int32 [3, B] on the device: tokens, stops, and the bits of float32 log-probabilities.
    """

    def __init__(self, outputs: Tensor) -> None:
        self._event = None
        if outputs.is_cuda:
            self._outputs = torch.empty(outputs.shape, dtype=outputs.dtype, pin_memory=True).copy_(outputs, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._outputs = outputs.clone()

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Wait for the copy; return tokens int32, stops int32 and log-probabilities float32, each [B]."""
        if self._event is not None:
            self._event.synchronize()
        tokens, stops, log_probabilities = self._outputs.numpy()
        return tokens, stops, log_probabilities.view(np.float32)


class Decoder:
    """A model, its pages of keys and values, and the rows of its batch.

    `Engine` decides which document is in which row, and writes the tables of the layout (`write_tables`, `start`, `clear`).
    """

    def __init__(self, model: Transformer, sampling: SamplingParams, cache: KVCacheConfig, *, graphs: bool = True) -> None:
        self.model, self.sampling, self.cache, self.device = model, sampling, cache, model.device
        self.blocks = cast(list[Block], list(model.layers))
        shape, rows, longest = model.config, cache.rows, sampling.maximum_tokens
        pages = (cache.pages, shape.kv_heads, cache.page_tokens, shape.head_dim)
        dtype = getattr(torch, cache.precision)
        # uninitialised: a CPU's system backs memory only when it is written
        self.key_value_pages = [
            (torch.empty(pages, dtype=dtype, device=self.device), torch.empty(pages, dtype=dtype, device=self.device))
            for _ in self.blocks
        ]

        def integers(*sizes: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(sizes, fill, dtype=dtype, device=self.device)

        self.tables = {
            "seed_pages": integers(rows, cache.pages_of(cache.seed_tokens)),
            "seed_tokens": integers(rows),
            "group_rows": integers(rows, cache.samples_per_seed, fill=-1),
            "row_group": integers(rows),
            "own_pages": integers(rows, cache.pages_of(longest)),
        }
        self.own_tokens = integers(rows)
        self.running = integers(rows)
        self.tokens = integers(rows, dtype=torch.int64)
        self.generated = integers(rows, longest)
        self.runs = integers(rows, longest, dtype=torch.int16)
        self.uniforms = torch.zeros(rows, longest, dtype=torch.float64, device=self.device)
        self.outputs = integers(3, rows)
        self.forbidden = torch.tensor(sampling.forbidden, dtype=torch.int64, device=self.device)
        self._state = (self.tokens, self.own_tokens, self.running, self.uniforms, self.generated, self.runs)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._captures = graphs and self.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    @torch.inference_mode()
    def prefill(self, seeds: Sequence[np.ndarray], pages: Sequence[Sequence[int]]) -> None:
        """Compute seeds as one packed sequence, and write their keys and values to the given pages."""
        lengths = [len(seed) for seed in seeds]
        padding = -sum(lengths) % ROW_MULTIPLE
        layout = PackedLayout.from_lengths([*lengths, padding] if padding else lengths)
        layout = layout.to(self.device, head_width=self.model.config.head_dim)
        tokens = np.concatenate([*seeds, np.zeros(padding, np.int64)]).astype(np.int64)
        locations = self.locate(pages, lengths)
        x_TW = self.model.embed_tokens(self._send(tokens))
        for number, (block, (keys, values)) in enumerate(zip(self.blocks, self.key_value_pages, strict=True)):
            q_THD, k_TKD, v_TKD = block.self_attn.project(block.input_layernorm(x_TW), layout.positions)
            write_to_pages(keys, values, k_TKD[: sum(lengths)], v_TKD[: sum(lengths)], *locations)
            if number + 1 < len(self.blocks):  # nothing reads the last layer's output
                attended_TW = block.self_attn.output(packed_attention(q_THD, k_TKD, v_TKD, layout))
                normed_TW, x_TW = block.post_attention_layernorm(attended_TW, x_TW)
                x_TW = x_TW + block.mlp(normed_TW)

    def locate(self, pages: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the page of each token of the seeds, and its offset in the page; int64 [tokens] each."""
        width = self.cache.page_tokens
        page = np.concatenate([np.repeat(own, width)[:length] for own, length in zip(pages, lengths, strict=True)])
        offset = np.concatenate([np.arange(length) % width for length in lengths])
        return self._send(page.astype(np.int64)), self._send(offset)

    def _send(self, values: np.ndarray) -> Tensor:
        """Copy an array to the device without waiting for it."""
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    @torch.inference_mode()
    def write_tables(self, tables: dict[str, np.ndarray]) -> None:
        """Replace tables of the layout, by name."""
        for name, values in tables.items():
            self.tables[name].copy_(self._send(values.copy()), non_blocking=True)

    @torch.inference_mode()
    def start(self, rows: Sequence[int], first: np.ndarray, uniforms: np.ndarray) -> None:
        """Begin documents in `rows` with the tokens `first`, int64 [rows], sampled by `uniforms`, float64 [rows, T]."""
        rows_B = self._send(np.array(rows, np.int64))
        self.tokens[rows_B], self.own_tokens[rows_B], self.running[rows_B] = self._send(first), 0, 1
        self.uniforms[rows_B] = self._send(uniforms)

    @torch.inference_mode()
    def clear(self, rows: Sequence[int]) -> None:
        """Make rows idle."""
        rows_B = self._send(np.array(rows, np.int64))
        self.own_tokens[rows_B], self.running[rows_B] = 0, 0

    @torch.inference_mode()
    def move(self, rows: Sequence[int]) -> None:
        """Move `rows` to the front, in this order, and make every other row idle. The tables are not touched."""
        rows_B = self._send(np.array(rows, np.int64))
        for state in self._state:
            state[: len(rows)] = state[rows_B]
        self.own_tokens[len(rows) :], self.running[len(rows) :] = 0, 0

    def size_for(self, rows: int) -> int:
        """Return the size of the step for `rows` rows; on CUDA there are few sizes, as each has a graph."""
        size = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
        if self.device.type == "cuda":
            size = ROW_MULTIPLE * 2 ** (size // ROW_MULTIPLE - 1).bit_length()
        return min(size, self.cache.rows)

    @torch.inference_mode()
    def step(self, size: int) -> StepResult:
        """Sample one token in each of the first `size` rows that has a document."""
        if not self._captures:
            self._advance(size)
        else:
            if size not in self._graphs:
                self._graphs[size] = self._capture(size)
            self._graphs[size].replay()
        return StepResult(self.outputs[:, :size])

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """Capture a step as a graph, after a step of idle rows that compiles the kernels and allocates workspaces."""
        saved = [state.clone() for state in self._state]
        self.own_tokens.zero_()
        self.running.zero_()
        self._advance(size)
        for state, value in zip(self._state, saved, strict=True):
            state.copy_(value)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):  # one pool: the graphs never run side by side
            self._advance(size)
        return graph

    def _advance(self, size: int) -> None:
        layout = DecodeLayout(**{name: table[:size] for name, table in self.tables.items()}, own_tokens=self.own_tokens[:size])
        running_B, own_B, tokens_B = self.running[:size], self.own_tokens[:size], self.tokens[:size]
        own_B += running_B
        logits_BV = self.logits(tokens_B, layout)
        newest_B1 = (own_B - 1).clamp(min=0).long().unsqueeze(1)
        sampled_B, log_probabilities_B = sample_tokens(
            logits_BV,
            self.uniforms[:size].gather(1, newest_B1).squeeze(1),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            forbidden=self.forbidden,
        )
        stops_B = self._record(size, newest_B1, sampled_B)
        tokens_B.copy_(sampled_B)
        self.outputs[0, :size], self.outputs[1, :size] = sampled_B, stops_B
        self.outputs[2, :size] = log_probabilities_B.view(torch.int32)
        running_B *= stops_B == RUNNING

    def logits(self, tokens_B: Tensor, layout: DecodeLayout) -> Tensor:
        """Append one token to each row; return the logits of the next one, [B, V] in the model's dtype."""
        positions_B = layout.positions
        x_BW = self.model.embed_tokens(tokens_B)
        normed_BW = self.blocks[0].input_layernorm(x_BW)
        # the norm after each block adds the block's output to the residual stream: launches are what a small step waits for
        norms = [*(block.input_layernorm for block in self.blocks[1:]), self.model.norm]
        for block, norm, (keys, values) in zip(self.blocks, norms, self.key_value_pages, strict=True):
            q_BHD, k_BKD, v_BKD = block.self_attn.project(normed_BW, positions_B)
            append_to_pages(keys, values, k_BKD, v_BKD, layout)
            attended_BW = block.self_attn.output(decode_attention(q_BHD, keys, values, layout))
            normed_BW, x_BW = block.post_attention_layernorm(attended_BW, x_BW)
            normed_BW, x_BW = norm(block.mlp(normed_BW), x_BW)
        return self.model.logits(normed_BW)

    def _record(self, size: int, newest_B1: Tensor, sampled_B: Tensor) -> Tensor:
        """Record the sampled tokens; return why each row stops now, RUNNING where it goes on; int32 [B]."""
        generated_BT, own_B = self.generated[:size], self.own_tokens[:size]
        generated_BT.scatter_(1, newest_B1, sampled_B.unsqueeze(1).int())
        stops_B = torch.where(own_B >= self.sampling.maximum_tokens, LENGTH, RUNNING)
        if self.sampling.repeated_tokens:
            repeated_B = repeats(self.runs[:size], generated_BT, own_B, self.sampling.repeated_tokens)
            stops_B = torch.where(repeated_B, REPETITION, stops_B)
        return torch.where(sampled_B == self.sampling.end, END, stops_B).int()
