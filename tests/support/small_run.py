"""Documents of three topics and settings with which a whole run takes some twenty seconds."""

from __future__ import annotations

import random

SETTINGS = (
    "threads=1",
    "corpus.heldout_share=0.1",
    "corpus.unique_share=0.8",
    "corpus.vocabulary_size=300",
    "embed.maximum_tokens=16",
    "pair.similarity_low=0.2",
    "model={layers=1, hidden_size=16, heads=1, kv_heads=1, head_dim=16, intermediate_size=32, context=128}",
    "pretrain={tokens=8192, tokens_per_step=1024, microbatch_tokens=512, learning_rate=0.01}",
    "synthesizer={tokens=2048, tokens_per_step=1024, microbatch_tokens=512, learning_rate=1e-3}",
    "synthesize.maximum_tokens=48",
    "filter.keep_unfinished=true",
    "filter.minimum_tokens=4",
    "filter.minimum_compression_ratio=0",
    "filter.maximum_malformed_characters=1",
    "filter.maximum_repeated_shingles=1",
    "evaluate.continuation_questions=8",
    "quality.judged_documents=4",
    "arms.oracle.enabled=false",
)
TOPICS = {
    "sea": "ship harbor wave sailor anchor tide captain deck",
    "farm": "wheat field plough barn cattle harvest seed soil",
    "court": "judge jury law verdict witness trial appeal sentence",
}


def make_documents(count: int = 150) -> dict[str, str]:
    """Return texts of four sentences by id, `topic-number`."""
    generator = random.Random(0)
    documents = {}
    for number in range(count):
        topic = list(TOPICS)[number % len(TOPICS)]
        sentences = (" ".join(generator.choices(TOPICS[topic].split(), k=6)).capitalize() + "." for _ in range(4))
        documents[f"{topic}-{number}"] = " ".join(sentences)
    return documents
