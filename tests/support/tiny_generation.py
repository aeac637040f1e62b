"""A small model, seeds and sampling parameters for the tests of generation."""

import numpy as np
import torch
from sbp_kernels import PackedLayout

from sbp_fast.config import ModelConfig
from sbp_fast.generate.decoder import KVCacheConfig, SamplingParams
from sbp_fast.generate.engine import Engine, GenerationResult, Seed
from sbp_fast.model.transformer import Transformer

SHAPE = ModelConfig(layers=2, hidden_size=32, heads=4, kv_heads=2, head_dim=8, intermediate_size=48, context=40)
VOCABULARY, BEGIN, END, PARTNER = 50, 0, 1, 2
SAMPLING = SamplingParams(PARTNER, END, (BEGIN, PARTNER), 40, temperature=0.9, top_p=0.95)
CACHE = KVCacheConfig(rows=32, samples_per_seed=8, pages=400, page_tokens=16, seed_tokens=40, prefill_tokens=100)
RUN_SEED = 11


def small_model() -> Transformer:
    """Return a model whose distributions are far from uniform, and in which each token matters for the next ones."""
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
    """Return seeds of random tokens and lengths."""
    random = np.random.default_rng(0)
    return [
        Seed(number, 7 * number, random.integers(3, VOCABULARY, random.integers(1, longest + 1)), tuple(range(samples)))
        for number in range(count)
    ]


def generate(
    model: Transformer, seeds: list[Seed], sampling: SamplingParams = SAMPLING, cache: KVCacheConfig = CACHE
) -> dict[tuple[int, int], GenerationResult]:
    """Return every result by seed and sample; each sample is generated exactly once, and all pages are freed."""
    engine = Engine(model, sampling, cache, RUN_SEED)
    results = list(engine.generate(seeds))
    assert sorted((result.seed, result.sample) for result in results) == sorted(
        (seed.number, sample) for seed in seeds for sample in seed.samples
    )
    assert engine.pool.free == cache.pages - 1
    return {(result.seed, result.sample): result for result in results}


def described(results: dict[tuple[int, int], GenerationResult]) -> dict[tuple[int, int], tuple[list[int], str, float]]:
    """Return results in a form that compares bit for bit."""
    return {key: (result.tokens.tolist(), result.stop, result.log_probability) for key, result in results.items()}


def packed_logits(model: Transformer, seed: np.ndarray, child: list[int]) -> torch.Tensor:
    """Return logits [len(child), V] after each token of a partner, by the training model's own forward pass."""
    tokens = torch.tensor([*seed.tolist(), *child])
    layout = PackedLayout.from_tree([len(seed), len(child)], [-1, 0]) if len(seed) else PackedLayout.from_lengths([len(child)])
    with torch.inference_mode():
        return model.logits(model(tokens, layout))[len(seed) :]
