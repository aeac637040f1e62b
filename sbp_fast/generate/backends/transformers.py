"""Documents drawn by transformers' `generate`: a check of our engine by another implementation of model and sampling.

Greedy documents are those of the engine. Others are drawn by the same rule but with torch's random numbers, seeded for each
batch, so that a document depends on what is drawn together with it: with `batch_documents`, and on which documents a killed
attempt had left. `generate` goes on after a repetition; what follows it is cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers import __version__ as version
from transformers.utils.logging import disable_progress_bar

from sbp_fast.config import RunConfig
from sbp_fast.generate.backends.backend import Drawers, model_precision
from sbp_fast.generate.backends.stop_rules import make_draft
from sbp_fast.generate.decoder import SamplingRule
from sbp_fast.generate.engine import Draft, Seed
from sbp_fast.generate.rng import document_seed

BATCH_DOCUMENTS = 32
WINDOW_BATCHES = 8
"""So many batches are filled together, from seeds sorted by length: the padding is what their lengths differ by."""


def open_transformers(config: RunConfig, exported: Path, rule: SamplingRule, device: torch.device, threads: int) -> Drawers:
    """The exported synthesizer, once in this process."""
    settings = config.synthesize
    precision = model_precision(settings, device)
    disable_progress_bar()  # of loading weights
    model = AutoModelForCausalLM.from_pretrained(exported, local_files_only=True, dtype=getattr(torch, precision))
    rows = BATCH_DOCUMENTS if settings.batch_documents == "auto" else settings.batch_documents
    drawer = TransformersDrawer(model.to(device).eval(), rule, rows, config.seed)
    facts = {"precision": precision, "batch_documents": rows, "transformers": version}
    return Drawers([drawer], threads, facts, {"transformers": version})


class TransformersDrawer:
    """Draws batch after batch; a batch is over with its longest document."""

    def __init__(self, model: PreTrainedModel, rule: SamplingRule, rows: int, run_seed: int) -> None:
        self.model, self.rule, self.rows, self.run_seed = model, rule, rows, run_seed
        sampling = {"temperature": rule.temperature, "top_p": rule.top_p, "top_k": rule.top_k} if rule.temperature else {}
        self.model.generation_config = GenerationConfig(
            do_sample=rule.temperature > 0,
            max_new_tokens=rule.maximum_tokens,
            eos_token_id=rule.end,
            pad_token_id=rule.end,
            **sampling,
        )

    def draw(self, seeds: Iterable[Seed]) -> Iterator[Draft]:
        """Every sample of every seed."""
        source = iter(seeds)
        while window := list(islice(source, self.rows * WINDOW_BATCHES)):
            window.sort(key=lambda seed: len(seed.tokens))
            documents = [(seed, sample) for seed in window for sample in seed.samples]
            for start in range(0, len(documents), self.rows):
                yield from self._draw_batch(documents[start : start + self.rows])

    def _draw_batch(self, documents: Sequence[tuple[Seed, int]]) -> Iterator[Draft]:
        tokens_BT, mask_BT = self._prompts([seed for seed, _ in documents])
        record = DrawnLogProbabilities(self.rule.forbidden)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices):
            first, sample = documents[0]
            torch.manual_seed(document_seed(self.run_seed, first.document, sample))
            processors = LogitsProcessorList([record])
            all_BT = self.model.generate(tokens_BT, attention_mask=mask_BT, logits_processor=processors)
            drawn_BT = all_BT[:, tokens_BT.shape[1] :]
            nats_BT = record.read(drawn_BT)
        drawn, nats = drawn_BT.cpu().numpy(), nats_BT.cpu().numpy()
        for row, (seed, sample) in enumerate(documents):
            yield make_draft(seed.number, sample, drawn[row], nats[row], self.rule)

    def _prompts(self, seeds: Sequence[Seed]) -> tuple[Tensor, Tensor]:
        """Each seed and the token that begins a document, padded on the left; int64 [B, T], and 1 where there is no padding."""
        width = 1 + max(len(seed.tokens) for seed in seeds)
        tokens, mask = np.full((len(seeds), width), self.rule.first), np.zeros((len(seeds), width), np.int64)
        for row, seed in enumerate(seeds):
            start = width - 1 - len(seed.tokens)
            tokens[row, start:-1], mask[row, start:] = seed.tokens, 1
        return torch.from_numpy(tokens).to(self.model.device), torch.from_numpy(mask).to(self.model.device)


class DrawnLogProbabilities(LogitsProcessor):
    """Forbids tokens, and keeps the log-probability that each drawn one had in the untouched logits.

    transformers puts it before temperature, top-k and top-p. A step's tokens are known when it is called for the next one, so
    that the distributions of one step alone are held.
    """

    def __init__(self, forbidden: Sequence[int]) -> None:
        self.forbidden = list(forbidden)
        self._newest: Tensor | None = None
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Takes int64 [B, T] and float32 [B, V]."""
        self._keep(input_ids[:, -1:])
        self._newest = scores.float().log_softmax(-1)
        return scores.index_fill(1, torch.tensor(self.forbidden, device=scores.device), -torch.inf)

    def _keep(self, drawn_B1: Tensor) -> None:
        if self._newest is not None:
            self._steps.append(self._newest.gather(1, drawn_B1).squeeze(1))

    def read(self, drawn_BT: Tensor) -> Tensor:
        """float32 [B, T], of the tokens that were drawn in all."""
        self._keep(drawn_BT[:, -1:])
        return torch.stack(self._steps, 1)
