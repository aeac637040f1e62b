"""Training steps and generation on documents of eight tokens, beside a plain batched implementation, on the CPU.

Short documents are where packing could cost most: a packed sequence holds hundreds of them. The plain implementation computes
the same model on a dense batch of documents, or of pairs side by side, which needs no packing since all lengths agree. It
generates without a cache of keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Prepared, Schedule, Tensors, no_inputs, no_results
from sbp_fast.config import ModelConfig, TrainConfig
from sbp_fast.generate.decoder import KVCacheConfig, SamplingParams
from sbp_fast.generate.engine import Engine, Seed
from sbp_fast.model.flops import forward_flops, training_flops
from sbp_fast.model.transformer import Attention, Block, Transformer
from sbp_fast.train.data.batches import NO_TARGET, PackedBatch
from sbp_fast.train.loop import train_step
from sbp_fast.train.optimizer import make_optimizers

TOKENS, VOCABULARY, RATE = 8, 72, 1e-3
MODEL = ModelConfig(
    layers=2, hidden_size=64, heads=4, kv_heads=4, head_dim=16, intermediate_size=176, rope_theta=200.0, context=TOKENS
)
SCHEDULE = Schedule(rounds=9, min_rounds=3, warm_up=2, repeats=3)
DOCUMENTS = {"documents": 512, "pairs": 256}
GENERATED = 2048


def short_documents() -> Iterator[Case]:
    """Return steps on documents and on pairs, then samples of seeds."""
    for kind, count in DOCUMENTS.items():
        yield _training_case(kind, count)
    yield _generation_case()


def _training_case(kind: str, count: int) -> Case:
    """Return steps on `count` dense rows: a document, or a seed with its partner, whose loss alone counts."""
    segments = 2 if kind == "pairs" else 1
    random = np.random.default_rng(0)
    rows = random.integers(3, VOCABULARY, (count, segments * TOKENS))
    targets = np.roll(rows, -1, axis=1)
    targets[:, TOKENS - 1 :: TOKENS] = NO_TARGET
    targets[:, : (segments - 1) * TOKENS] = NO_TARGET
    loss_tokens = int((targets != NO_TARGET).sum())
    pairs = count * (segments * TOKENS) * (segments * TOKENS + 1) // 2
    return Case(
        {"operation": f"training step, {kind}", "tokens a document": TOKENS, "rows": count, "hidden size": MODEL.hidden_size},
        no_inputs,
        {"ours": partial(_ours, rows, targets, segments), "plain dense batch": partial(_plain, rows, targets)},
        None,
        work=float(loss_tokens),
        unit="loss tokens",
        flops=training_flops(MODEL, VOCABULARY, rows.size, pairs, loss_tokens),
        verify=partial(_verify, rows, targets, segments),
        clock=time.process_time,
        schedule=SCHEDULE,
    )


def _model() -> Transformer:
    model = Transformer(MODEL, VOCABULARY)
    model.initialize(0)
    return model


def _pack(rows: np.ndarray, targets: np.ndarray, segments: int) -> PackedBatch:
    lengths = [TOKENS] * (len(rows) * segments)
    parents = [parent for row in range(len(rows)) for parent in (-1, 2 * row)] if segments == 2 else None
    return PackedBatch.build(rows.ravel(), targets.ravel(), lengths, length=rows.size, parents=parents)


def _ours(rows: np.ndarray, targets: np.ndarray, segments: int, _: Tensors) -> Prepared:
    """A step of the product, the packing of its sequence included."""
    model, recipe = _model(), TrainConfig(tokens_per_step=rows.size, microbatch_tokens=rows.size)
    optimizers = make_optimizers(model, recipe)

    def step() -> Any:
        return train_step(model, iter([_pack(rows, targets, segments)]), 1, optimizers, recipe, RATE)

    return Prepared(step, results=no_results)


def _plain(rows: np.ndarray, targets: np.ndarray, _: Tensors) -> Prepared:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)

    def step() -> Tensor:
        loss = plain_loss(model, torch.from_numpy(rows), torch.from_numpy(targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return Prepared(step, results=no_results)


def _verify(rows: np.ndarray, targets: np.ndarray, segments: int) -> dict[str, Any]:
    """Compare the loss and its gradients with those of the plain implementation in float64."""
    losses: list[Callable[[Transformer], Tensor]] = [
        lambda model: plain_loss(model, torch.from_numpy(rows), torch.from_numpy(targets)),
        partial(_packed_loss, _pack(rows, targets, segments)),
    ]
    results = []
    for loss in losses:
        model = _model().double()
        value = loss(model)
        gradients = torch.autograd.grad(value, list(model.parameters()))
        results.append([value.detach(), *gradients])
    errors = [float((mine - exact).norm() / exact.norm()) for exact, mine in zip(*results, strict=True)]
    return {"right": max(errors) < 1e-10, "errors": {"ours": {"loss and gradients": max(errors)}}}


def _packed_loss(batch: PackedBatch, model: Transformer) -> Tensor:
    return model(batch.tokens, batch.layout, batch.targets, batch.loss_rows) / batch.counts.loss_tokens


def plain_loss(model: Transformer, rows: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of dense rows [B, L]."""
    logits = F.linear(plain_hidden(model, rows), model.embed_tokens.weight)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)


def plain_hidden(model: Transformer, rows: Tensor) -> Tensor:
    """Return the hidden states [B, L, W] of a model by torch's own operations alone."""
    x = model.embed_tokens(rows)
    for block in cast(list[Block], list(model.layers)):
        normed = F.rms_norm(x, x.shape[-1:], block.input_layernorm.weight, MODEL.norm_eps)
        x = x + _plain_attention(block.self_attn, normed)
        normed = F.rms_norm(x, x.shape[-1:], block.post_attention_layernorm.weight, MODEL.norm_eps)
        gate, up = block.mlp.gate_up_proj(normed).chunk(2, -1)
        x = x + block.mlp.down_proj(F.silu(gate) * up)
    return F.rms_norm(x, x.shape[-1:], model.norm.weight, MODEL.norm_eps)


def _plain_attention(attention: Attention, x: Tensor) -> Tensor:
    q, k, v = attention.qkv_proj(x).unflatten(-1, (3, MODEL.heads, MODEL.head_dim)).permute(2, 0, 3, 1, 4)
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * MODEL.rope_theta ** (
        -torch.arange(0, MODEL.head_dim, 2, dtype=x.dtype) / MODEL.head_dim
    )

    def rotated(y: Tensor, weight: Tensor) -> Tensor:
        a, b = F.rms_norm(y, y.shape[-1:], weight, MODEL.norm_eps).chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    assert attention.q_norm is not None and attention.k_norm is not None
    q, k = rotated(q, attention.q_norm.weight), rotated(k, attention.k_norm.weight)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention.o_proj(out.transpose(1, 2).flatten(2))


def _generation_case() -> Case:
    """Return documents of at most eight tokens after seeds of eight, two for each seed."""
    tokens = float(GENERATED * TOKENS)
    pairs = GENERATED * TOKENS * (3 * TOKENS + 1) / 2
    return Case(
        {"operation": "generation", "tokens a document": TOKENS, "documents": GENERATED, "hidden size": MODEL.hidden_size},
        no_inputs,
        {"ours": _engine, "plain, no cache": _plain_sampling},
        None,
        work=tokens,
        unit="tokens",
        flops=forward_flops(MODEL, VOCABULARY, tokens, pairs, tokens),
        clock=time.process_time,
        schedule=Schedule(rounds=5, min_rounds=2, warm_up=1),
    )


def _seeds() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (GENERATED // 2, TOKENS))


def _engine(_: Tensors) -> Prepared:
    sampling = SamplingParams(first=2, end=0, forbidden=(0, 1, 2), maximum_tokens=TOKENS, top_p=0.9)
    cache = KVCacheConfig(rows=512, samples_per_seed=2, pages=4096, page_tokens=16, seed_tokens=TOKENS, prefill_tokens=8192)
    model, seeds = _model(), _seeds()

    def run() -> int:
        engine = Engine(model, sampling, cache, 0)
        return sum(len(result.tokens) for result in engine.generate(Seed(n, n, seed, (0, 1)) for n, seed in enumerate(seeds)))

    return Prepared(run, results=no_results)


def _plain_sampling(_: Tensors) -> Prepared:
    model, seeds = _model(), torch.from_numpy(_seeds()).repeat_interleave(2, 0)

    @torch.no_grad()
    def run() -> Tensor:
        rows = F.pad(seeds, (0, 1), value=2)
        for _ in range(TOKENS):
            probabilities = F.linear(plain_hidden(model, rows)[:, -1], model.embed_tokens.weight).softmax(-1)
            ordered, ids = probabilities.sort(descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= 0.9, 0)
            rows = torch.cat([rows, ids.gather(1, torch.multinomial(ordered, 1))], 1)
        return rows

    return Prepared(run, results=no_results)
