"""The stage `quality`: the quality of synthetic documents, beside real text and the paper's figures.

It measures the paper's five rates (arXiv 2509.15248, section 4) and what its reviewers asked for: new wording, lengths,
copying from the whole corpus, rates by source. docs/method.md says how each differs from the paper's.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.config import RunConfig, resolve_device
from sbp_fast.config.embed import OF_FILE
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.judge import Judge, fingerprint_directory, open_judge
from sbp_fast.evaluate.judge_answers import PROMPTS, collect_answers, questions, verdict_counts, verdicts_of
from sbp_fast.evaluate.quality_rates import Measured, measure_rates, published_rates, rates_by_source
from sbp_fast.evaluate.quality_samples import Samples, measure_copying
from sbp_fast.evaluate.relevance import Judged, no_similarities, similarities, summarize_similarity
from sbp_fast.generate.saved import open_synthetic
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.files import atomic_path, hash_value
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

JUDGED = "judged.parquet"
LENGTH_BINS, PROBABILITY_BINS = 24, 30


def measure_quality(
    config: RunConfig,
    out: Path,
    *,
    corpus: Path,
    synthetic: Path,
    filtered: Path,
    pairs: Path,
    console: Console,
    force: bool = False,
) -> Manifest:
    """Measure synthetic documents; writes `judged.parquet`, one row for each judged document.

    Args:
        config: of the run.
        out: directory of the output.
        corpus: output of `prepare`.
        synthetic: output of `synthesize` on it.
        filtered: output of `filter` on that.
        pairs: output of `pair` on the corpus; a document is unrelated to its seed below the low end of its band. Where the
            vectors were made elsewhere, documents are not compared with their seeds.
        console: for progress.
        force: replace an output that was made from other settings or inputs.

    Raises:
        UserError: the inputs do not belong together; the encoder or the judge cannot be used.
    """

    def body(context: StageContext) -> None:
        _check_match(corpus, synthetic, filtered, pairs)
        prepared = PreparedCorpus(corpus)
        context.device = resolve_device(config)
        judge = open_judge(config.quality, context.device)
        samples = Samples.sample(config, prepared, open_synthetic(synthetic, prepared), Corpus(filtered))
        _measure(config, prepared, samples, pairs, judge, context)

    inputs: dict[str, Path | str] = {"corpus": corpus, "synthetic": synthetic, "filtered": filtered, "pairs": pairs}
    if config.quality.judge == "local" and Path(config.quality.judge_model).is_dir():
        inputs["judge"] = fingerprint_directory(config.quality.judge_model)
    return run_stage(
        "quality",
        out,
        config={
            "seed": config.seed,
            "embed": config.embed.settings(),
            "filter": config.filter.model_dump(mode="json", include={"shingle_tokens", "copy_containment"}),
            "quality": config.quality.settings(),
            "prompts": hash_value(PROMPTS),
        },
        inputs=inputs,
        body=body,
        console=console,
        force=force,
    )


def _check_match(corpus: Path, synthetic: Path, filtered: Path, pairs: Path) -> None:
    for directory, stage, name, source in ((filtered, "filter", "synthetic", synthetic), (pairs, "pair", "corpus", corpus)):
        if Manifest.read(directory, stage).inputs.get(name) != Manifest.read(source).fingerprint:
            raise UserError(directory, f"was not made from {source}", f"give the output of {stage} on it")


def _band(pairs: Path) -> tuple[float, bool]:
    """Return the low end of the band of pairs, and whether their encoder is known and can measure documents by it.

    Raises:
        UserError: known pairs, which have no band.
    """
    counts = Manifest.read(pairs, "pair").counts
    if "band" not in counts:
        raise UserError(pairs, "has known pairs: there is no band to measure documents by", "give pairs found by vectors")
    return counts["band"]["low"], counts.get("encoder") != OF_FILE


def _measure(
    config: RunConfig,
    prepared: PreparedCorpus,
    samples: Samples,
    pairs: Path,
    judge: Judge | None,
    context: StageContext,
) -> None:
    context.console.say(f"measuring {len(samples.generated)} documents, and {len(samples.passed)} filtered ones")
    copied = measure_copying(config, prepared, samples)
    judged = Judged.sample(samples.filtered, PairSet(pairs), config.quality.judged_documents, config.seed)
    low, has_encoder = _band(pairs)
    similar = no_similarities(judged)
    if has_encoder:
        similar, context.flops = similarities(config, prepared, samples.filtered, judged, context.device, context.console)
    judge_counts, verdicts = None, {}
    if judge is not None:
        asked = questions(prepared, samples.filtered, judged)
        answers = collect_answers(judge, asked, context.directory, context.console, context.save_clock)
        verdicts = {name: verdicts_of(asked, answers, name, len(judged.documents)) for name in PROMPTS}
        judge_counts = verdict_counts(judge, asked, answers)
        context.record(judge=judge_counts)
    measured = Measured(config, samples, copied, judged, similar, low, judge_counts, verdicts)
    _write_judged(prepared, samples.filtered, judged, similar, verdicts, context.directory)
    context.record(
        quality=measure_rates(measured),
        published=published_rates(),
        similarity=summarize_similarity(similar, low) if has_encoder else None,
        novel=copied.novel,
        lengths=_lengths(samples, config.model.context),
        sources=rates_by_source(measured, prepared.unique.sources),
        stops=_shares(samples.written.column("stop")[samples.measured]),
        log_probability=_log_probabilities(samples),
        measured={name: len(getattr(samples, name)) for name in ("generated", "passed", "heldout", "unique")},
    )


def _lengths(samples: Samples, context: int) -> dict[str, list[int]]:
    edges = np.linspace(0, context, LENGTH_BINS + 1).astype(int)

    def histogram(documents: list[np.ndarray]) -> list[int]:
        return np.histogram(np.minimum([len(document) - 2 for document in documents], context), edges)[0].tolist()

    return {"edges": edges.tolist(), "synthetic": histogram(samples.passed), "real": histogram(samples.unique)}


def _log_probabilities(samples: Samples) -> dict[str, Any]:
    """Return the mean and a histogram of the generated documents' mean log-probabilities, in nats a token."""
    values = samples.written.column("mean_log_probability")[samples.measured]
    counts, edges = np.histogram(values, PROBABILITY_BINS)
    return {"mean": float(values.mean()) if len(values) else None, "edges": edges.tolist(), "generated": counts.tolist()}


def _shares(values: np.ndarray) -> dict[str, float]:
    return {str(value): number / len(values) for value, number in sorted(Counter(values.tolist()).items())}


def _write_judged(
    prepared: PreparedCorpus,
    filtered: Corpus,
    judged: Judged,
    similar: dict[str, np.ndarray],
    verdicts: dict[str, np.ndarray],
    directory: Path,
) -> None:
    columns = {
        "id": filtered.ids[judged.documents],
        "source": prepared.unique.sources[judged.seeds],
        "seed": judged.seeds,
        "elsewhere": judged.elsewhere,
        "neighbor": judged.neighbors,
        "mean_log_probability": filtered.column("mean_log_probability")[judged.documents],
        **{f"similarity_{name}": values for name, values in similar.items()},
        **{f"judged_{name}": pa.array(values == 1, mask=np.isnan(values)) for name, values in verdicts.items()},
    }
    with atomic_path(directory / JUDGED) as temporary:
        pq.write_table(pa.table(columns), temporary)
