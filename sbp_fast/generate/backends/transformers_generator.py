"""Documents from transformers' `generate`: a check of the engine by another implementation of model and sampling.

Greedy documents equal the engine's. Sampled ones follow the same distribution but use torch's random numbers, seeded for each
batch, so that a document depends on the batch it is generated in: on `batch_documents`, and on which documents a killed attempt
had left. `generate` continues after a repetition; the stop rules truncate what follows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from sbp_fast.generate.backends.stop_rules import truncated_result
from sbp_fast.generate.decoder import SamplingParams
from sbp_fast.generate.engine import GenerationResult, Seed
from sbp_fast.generate.rng import document_seed

WINDOW_BATCHES = 8
"""Batches filled together, from seeds sorted by length, which keeps the padding small."""


def load_exported(exported: Path, precision: str, device: torch.device) -> PreTrainedModel:
    """Load a Hugging Face directory for inference, without a progress bar."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(exported, local_files_only=True, dtype=getattr(torch, precision))
    return model.to(device).eval()


class TransformersGenerator:
    """Generates one batch after the other; a batch ends with its longest document."""

    def __init__(self, model: PreTrainedModel, sampling: SamplingParams, rows: int, run_seed: int) -> None:
        self.model, self.sampling, self.rows, self.run_seed = model, sampling, rows, run_seed
        warpers = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        self.model.generation_config = GenerationConfig(
            do_sample=sampling.temperature > 0,
            max_new_tokens=sampling.maximum_tokens,
            eos_token_id=sampling.end,
            pad_token_id=sampling.end,
            **(warpers if sampling.temperature else {}),
        )

    def generate(self, seeds: Iterable[Seed]) -> Iterator[GenerationResult]:
        """Yield a result for every sample of every seed."""
        source = iter(seeds)
        while window := list(islice(source, self.rows * WINDOW_BATCHES)):
            window.sort(key=lambda seed: len(seed.tokens))
            documents = [(seed, sample) for seed in window for sample in seed.samples]
            for start in range(0, len(documents), self.rows):
                yield from self._generate_batch(documents[start : start + self.rows])

    def _generate_batch(self, documents: Sequence[tuple[Seed, int]]) -> Iterator[GenerationResult]:
        tokens_BT, mask_BT = self._prompts([seed for seed, _ in documents])
        recorder = LogProbabilityRecorder(self.sampling.forbidden)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            first, sample = documents[0]
            torch.manual_seed(document_seed(self.run_seed, first.document, sample))
            processors = LogitsProcessorList([recorder])
            all_BT = self.model.generate(tokens_BT, attention_mask=mask_BT, logits_processor=processors)
            generated_BT = all_BT[:, tokens_BT.shape[1] :]
            nats_BT = recorder.read(generated_BT)
        generated, nats = generated_BT.cpu().numpy(), nats_BT.cpu().numpy()
        for row, (seed, sample) in enumerate(documents):
            yield truncated_result(seed.number, sample, generated[row], nats[row], self.sampling)

    def _prompts(self, seeds: Sequence[Seed]) -> tuple[Tensor, Tensor]:
        """Return each seed and the token that begins a document, padded on the left, and their mask; int64 [B, T] both."""
        width = 1 + max(len(seed.tokens) for seed in seeds)
        tokens, mask = np.full((len(seeds), width), self.sampling.first), np.zeros((len(seeds), width), np.int64)
        for row, seed in enumerate(seeds):
            start = width - 1 - len(seed.tokens)
            tokens[row, start:-1], mask[row, start:] = seed.tokens, 1
        return torch.from_numpy(tokens).to(self.model.device), torch.from_numpy(mask).to(self.model.device)


class LogProbabilityRecorder(LogitsProcessor):
    """Forbids tokens, and records the log-probability of each sampled token under the unprocessed logits.

    transformers calls it before temperature, top-k and top-p. A step's tokens are known when it is called for the next step, so
    only one step's distributions are in memory.
    """

    def __init__(self, forbidden: Sequence[int]) -> None:
        self.forbidden = list(forbidden)
        self._newest: Tensor | None = None
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process one step: int64 [B, T] and float32 [B, V] -> float32 [B, V]."""
        self._record(input_ids[:, -1:])
        self._newest = scores.float().log_softmax(-1)
        return scores.index_fill(1, torch.tensor(self.forbidden, device=scores.device), -torch.inf)

    def _record(self, tokens_B1: Tensor) -> None:
        if self._newest is not None:
            self._steps.append(self._newest.gather(1, tokens_B1).squeeze(1))

    def read(self, generated_BT: Tensor) -> Tensor:
        """Return the log-probabilities of all generated tokens, float32 [B, T]."""
        self._record(generated_BT[:, -1:])
        return torch.stack(self._steps, 1)
