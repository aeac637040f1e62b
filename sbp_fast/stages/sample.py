"""The command `sample`: what a model writes after a text, or after nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sbp_fast.config import RunConfig, resolve_device
from sbp_fast.config.synthesize import NO_SEEDS
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.evaluate.scoring import check_vocabulary
from sbp_fast.generate.backends.backend import sampling_params
from sbp_fast.generate.engine import GenerationResult
from sbp_fast.generate.samples import generate_samples
from sbp_fast.model.saved import load_model
from sbp_fast.model.transformer import Transformer
from sbp_fast.pipeline.progress import Console


def sample(config: RunConfig, model: Path, *, corpus: Path, seed_text: str, count: int, console: Console) -> list[str]:
    """Return documents that a model writes, as `synthesize` would, and print them.

    Args:
        config: its `synthesize` says how tokens are sampled, its `seed` is the key of the random numbers.
        model: directory of a trained model.
        corpus: output of `prepare`, whose tokenizer the model has.
        seed_text: text after which the documents are written, as by a synthesizer; "" for none, as by a pretrained model.
        count: number of documents.
        console: for progress.

    Raises:
        UserError: no finished corpus or no model, or the model has another vocabulary.
    """
    prepared, trained = PreparedCorpus(corpus), load_model(model, resolve_device(config))
    tokens, results = write_after(config, trained, prepared, seed_text, count, where=model.name)
    if tokens > (context := trained.config.context):
        console.say(f"the text has {tokens} tokens, of which the model read the first {context}")
    texts = [prepared.tokenizer.decode(result.tokens) for result in results]
    for number, (text, result) in enumerate(zip(texts, results, strict=True), start=1):
        console.say(f"--- document {number} of {count}: {result.generated_tokens} tokens, ended by {result.stop}")
        for line in text.splitlines():
            console.say(line)
    return texts


def write_after(
    config: RunConfig, model: Transformer, prepared: PreparedCorpus, seed_text: str, count: int, where: str = "the model"
) -> tuple[int, list[GenerationResult]]:
    """Return the tokens of a text, and `count` documents that a model writes after what of it fits into a context.

    Args:
        config: see `sample`.
        model: a trained model.
        prepared: the corpus whose tokenizer the model has.
        seed_text: see `sample`.
        count: number of documents.
        where: names the model in messages.

    Raises:
        UserError: the model has another vocabulary.
    """
    check_vocabulary(model, prepared, where)
    context, tokenizer = model.config.context, prepared.tokenizer
    settings = config.synthesize if seed_text else config.synthesize.model_copy(update={"seeds": NO_SEEDS})
    tokens = np.array([tokenizer.begin, *tokenizer.encode(seed_text), tokenizer.end] if seed_text else [], np.int64)
    sampling = sampling_params(settings, prepared, context)
    return len(tokens), generate_samples(model, sampling, dict.fromkeys(range(count), tokens[:context]), config.seed)
