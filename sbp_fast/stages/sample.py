"""The command `sample`: what a model writes after a text, or after nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sbp_fast.config import RunConfig, resolve_device
from sbp_fast.config.synthesize import NO_SEEDS
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.evaluate.scoring import check_vocabulary
from sbp_fast.generate.backends.backend import sampling_params
from sbp_fast.generate.samples import generate_samples
from sbp_fast.model.saved import load_model
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
    check_vocabulary(trained, prepared, model.name)
    context, tokenizer = trained.config.context, prepared.tokenizer
    settings = config.synthesize if seed_text else config.synthesize.model_copy(update={"seeds": NO_SEEDS})
    tokens = np.zeros(0, np.int64)
    if seed_text:
        tokens = np.array([tokenizer.begin, *tokenizer.encode(seed_text), tokenizer.end])
        if len(tokens) > context:
            console.say(f"the text has {len(tokens)} tokens, of which the model reads the first {context}")
            tokens = tokens[:context]
    sampling = sampling_params(settings, prepared, context)
    results = generate_samples(trained, sampling, dict.fromkeys(range(count), tokens), config.seed)
    texts = [tokenizer.decode(result.tokens) for result in results]
    for number, (text, result) in enumerate(zip(texts, results, strict=True), start=1):
        console.say(f"--- document {number} of {count}: {result.generated_tokens} tokens, ended by {result.stop}")
        for line in text.splitlines():
            console.say(line)
    return texts
