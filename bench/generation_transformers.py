"""Generation by transformers, with the weights of a model of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbp_fast.model.huggingface import hugging_face_config, to_hugging_face
from sbp_fast.model.transformer import Transformer

Sample = Callable[[int], int]
"""Number of seeds, the first of all -> tokens sampled."""


def in_transformers(model: Transformer) -> Any:
    """Return the same weights as a model of transformers."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        **hugging_face_config(model.config, model.vocabulary_size, positions=2 * model.config.context, where=Path("bench"))
    )
    dtype = model.embed_tokens.weight.dtype
    with model.device:
        twin = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    twin.load_state_dict(to_hugging_face(model))
    return twin.eval()


def padded_batches(
    model: Transformer,
    prompts: Sequence[np.ndarray],
    samples: int,
    rows: int,
    sampling: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Sample:
    """Sample with `generate`, in batches of prompts of similar lengths, padded on the left.

    Args:
        model: ours.
        prompts: token ids of each.
        samples: documents of each prompt.
        rows: documents at once.
        sampling: options of transformers that say how tokens are sampled.
        options: further options of `generate`.
    """
    twin = in_transformers(model)
    together, end = max(1, rows // samples), sampling["eos_token_id"]

    @torch.inference_mode()
    def sample(count: int) -> int:
        tokens, ordered = 0, sorted(prompts[:count], key=len)
        for start in range(0, len(ordered), together):
            batch = ordered[start : start + together]
            longest = max(map(len, batch))
            ids = torch.tensor(np.stack([np.pad(ids, (longest - len(ids), 0)) for ids in batch]), device=model.device)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
            output = twin.generate(ids, attention_mask=mask, num_return_sequences=samples, **sampling, **options)[:, longest:]
            ended = (output == end).int()
            tokens += int(torch.where(ended.any(1), ended.argmax(1) + 1, output.shape[1]).sum())
        return tokens

    return sample


def continuous_batches(
    model: Transformer, prompts: Sequence[np.ndarray], samples: int, rows: int, sampling: Mapping[str, Any]
) -> Sample:
    """Sample with `generate_batch`, the continuous batching of transformers over pages; arguments as for `padded_batches`."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    twin = in_transformers(model)
    twin.set_attn_implementation("paged|sdpa")
    generation = GenerationConfig(**sampling)
    batching = ContinuousBatchingConfig(max_requests_per_batch=rows, max_memory_percent=0.5)

    def sample(count: int) -> int:
        requests = [ids.tolist() for ids in prompts[:count] for _ in range(samples)]
        outputs = twin.generate_batch(requests, generation_config=generation, continuous_batching_config=batching)
        return sum(len(output.generated_tokens) for output in outputs.values())

    return sample


@torch.inference_mode()
def log_probability_error(model: Transformer, documents: Sequence[tuple[np.ndarray, list[int]]], total: float) -> float:
    """Return the relative error of `total` as the log-probability, in nats, of all documents, each after its prompt."""
    twin, exact = in_transformers(model), 0.0
    for prompt, document in documents:
        ids = torch.tensor([[*prompt.tolist(), *document]], device=model.device)
        logits = twin(ids).logits[0, -len(document) - 1 : -1].float()
        exact += float(logits.log_softmax(-1).gather(1, ids[0, -len(document) :, None]).sum())
    return abs(total - exact) / abs(exact)
