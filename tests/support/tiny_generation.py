"""A small model, seeds and a rule for the tests of generation."""

import numpy as np
import torch
from sbp_kernels import PackedLayout

from sbp_fast.config import ModelConfig
from sbp_fast.generate.decoder import Room, SamplingRule
from sbp_fast.generate.engine import Draft, Engine, Seed
from sbp_fast.model.transformer import Transformer

SHAPE = ModelConfig(layers=2, hidden_size=32, heads=4, kv_heads=2, head_dim=8, intermediate_size=48, context=40)
VOCABULARY, BEGIN, END, PARTNER = 50, 0, 1, 2
RULE = SamplingRule(PARTNER, END, (BEGIN, PARTNER), 40, temperature=0.9, top_p=0.95)
ROOM = Room(rows=32, group=8, pages=400, page_tokens=16, seed_tokens=40, prefill_tokens=100)
RUN_SEED = 11


def small_model() -> Transformer:
    """Far from uniform: each token matters for the next ones."""
    model = Transformer(SHAPE, VOCABULARY)
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
        model.embed_tokens.weight.mul_(0.3)
        for block in model.layers:
            block.self_attn.q_norm.weight.mul_(3)
    return model.eval()


def some_seeds(count: int, samples: int = 3, longest: int = 40) -> list[Seed]:
    random = np.random.default_rng(0)
    return [
        Seed(number, 7 * number, random.integers(3, VOCABULARY, random.integers(1, longest + 1)), tuple(range(samples)))
        for number in range(count)
    ]


def drawn(model: Transformer, seeds: list[Seed], rule: SamplingRule = RULE, room: Room = ROOM) -> dict[tuple[int, int], Draft]:
    """Every draft by seed and sample; each sample is drawn exactly once, and all pages come back."""
    engine = Engine(model, rule, room, RUN_SEED)
    drafts = list(engine.draw(seeds))
    assert sorted((draft.seed, draft.sample) for draft in drafts) == sorted(
        (seed.number, sample) for seed in seeds for sample in seed.samples
    )
    assert engine.pool.free == room.pages - 1
    return {(draft.seed, draft.sample): draft for draft in drafts}


def described(drafts: dict[tuple[int, int], Draft]) -> dict[tuple[int, int], tuple[list[int], str, float]]:
    """Comparable bit for bit."""
    return {key: (draft.tokens.tolist(), draft.stop, draft.log_probability) for key, draft in drafts.items()}


def packed_logits(model: Transformer, seed: np.ndarray, child: list[int]) -> torch.Tensor:
    """Logits [len(child), V] after each token of a partner, by the training model's own forward pass."""
    tokens = torch.tensor([*seed.tolist(), *child])
    layout = PackedLayout.from_tree([len(seed), len(child)], [-1, 0])
    with torch.inference_mode():
        return model.logits(model(tokens, layout))[len(seed) :]
