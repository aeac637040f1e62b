"""The stage `quality`: how good synthetic documents are, beside real text and beside what the paper measured.

The paper's five rates (arXiv 2509.15248, section 4) and what its reviewers asked for: new wording, lengths, copying from the
whole corpus, rates by source. docs/method.md says how each differs from the paper's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sbp_fast.config import RunConfig, resolve_device
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.dedup.shingle_index import Batch
from sbp_fast.dedup.shingles import repeated_share
from sbp_fast.errors import UserError
from sbp_fast.evaluate.judge import Judge, fingerprint_directory, open_judge
from sbp_fast.evaluate.judge_answers import PROMPTS, collect_answers, judged_rates, questions, verdict_counts, verdicts_of
from sbp_fast.evaluate.novelty import NOVEL_TOKENS, batch_of, known_counts, known_share, novel_rates
from sbp_fast.evaluate.quality import DUPLICATE_JACCARD, near_duplicates, rate, same_letters, unmeasured
from sbp_fast.evaluate.relevance import Judged, irrelevance, similarities, summarize_similarity
from sbp_fast.filters.features import compare_with_seeds
from sbp_fast.generate.saved import open_synthetic
from sbp_fast.pairs.pairset import PairSet
from sbp_fast.pipeline.files import atomic_path, hash_value, read_json
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import MANIFEST, Manifest, Work, run_stage

JUDGED = "judged.parquet"
LENGTH_BINS, PROBABILITY_BINS = 24, 30


def measure_quality(
    config: RunConfig,
    out: Path,
    *,
    corpus: Path,
    synthetic: Path,
    kept: Path,
    pairs: Path,
    console: Console,
    force: bool = False,
) -> Manifest:
    """Measure synthetic documents; writes `judged.parquet`, a row for each kept document that was looked at by itself.

    Args:
        corpus: output of `prepare`.
        synthetic: output of `synthesize` on it.
        kept: output of `filter` on that.
        pairs: output of `pair` on the corpus; the low end of its band tells a related document from an unrelated one.

    Raises:
        UserError: inputs that do not belong together; an encoder that cannot be loaded.
    """

    def body(work: Work) -> None:
        _check_match(corpus, synthetic, kept, pairs)
        prepared = PreparedCorpus(corpus)
        work.device = resolve_device(config)
        judge = open_judge(config.quality, work.device)
        samples = Samples.draw(config, prepared, open_synthetic(synthetic, prepared), Corpus(kept))
        low = read_json(pairs / MANIFEST)["counts"]["band"]["low"]
        _measure(config, prepared, samples, PairSet(pairs), low, judge, work)

    inputs: dict[str, Path | str] = {"corpus": corpus, "synthetic": synthetic, "kept": kept, "pairs": pairs}
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


def _check_match(corpus: Path, synthetic: Path, kept: Path, pairs: Path) -> None:
    for directory, stage, name, source in ((kept, "filter", "synthetic", synthetic), (pairs, "pair", "corpus", corpus)):
        if Manifest.load(directory, stage, hashed=False).inputs[name] != read_json(source / MANIFEST)["fingerprint"]:
            raise UserError(directory, f"was not made from {source}", f"give the output of {stage} on it")


@dataclass(frozen=True)
class Samples:
    """The documents that are measured.

    Attributes:
        written, kept: all documents, before and after the filters.
        drawn: int64, sorted indices of those measured of `written`.
        generated, passed, heldout, unique: their tokens, with <begin> and <end>: of `written`, of `kept`, and of real text.
    """

    written: Corpus
    kept: Corpus
    drawn: np.ndarray
    generated: list[np.ndarray]
    passed: list[np.ndarray]
    heldout: list[np.ndarray]
    unique: list[np.ndarray]

    @staticmethod
    def draw(config: RunConfig, prepared: PreparedCorpus, written: Corpus, kept: Corpus) -> Samples:
        count, generator = config.quality.measured_documents, np.random.default_rng(config.seed)
        drawn, passed, heldout = (np.sort(generator.permutation(len(one))[:count]) for one in (written, kept, prepared.heldout))
        return Samples(
            written,
            kept,
            drawn,
            [written[document] for document in drawn.tolist()],
            [kept[document] for document in passed.tolist()],
            [prepared.heldout[document] for document in heldout.tolist()],
            [prepared.unique[document] for document in range(min(len(passed), len(prepared.unique)))],
        )


def _measure(
    config: RunConfig, prepared: PreparedCorpus, samples: Samples, pairs: PairSet, low: float, judge: Judge | None, work: Work
) -> None:
    work.console.say(f"measuring {len(samples.generated)} documents, and {len(samples.passed)} of those kept")
    copied = _copies(config, prepared, samples)
    judged = Judged.draw(samples.kept, pairs, config.quality.judged_documents, config.seed)
    similar = similarities(config, prepared, samples.kept, judged, work)
    quality = _rates(config, samples, copied) | {
        "non_factual": unmeasured("not measured: needs a language-model judge"),
        "pair_irrelevance": irrelevance(similar, low),
    }
    irrelevant, verdicts = (similar["seed"] < low).astype(np.float64), {}
    if judge is not None:
        asked = questions(prepared, samples.kept, judged)
        answers = collect_answers(judge, asked, work)
        verdicts = {rate: verdicts_of(asked, answers, rate, len(judged.documents)) for rate in PROMPTS}
        counts = verdict_counts(judge, asked, answers)
        work.record(judge=counts)
        quality |= judged_rates(counts, verdicts)
        irrelevant = verdicts["pair_irrelevance"]
    _write_judged(prepared, samples.kept, judged, similar, verdicts, work.directory)
    work.record(
        quality=quality,
        similarity=summarize_similarity(similar, low),
        novel=copied.novel,
        lengths=_lengths(samples, config.model.context),
        sources=_by_source(config, prepared, samples, copied, judged, irrelevant),
        stops=_shares(samples.written.column("stop")[samples.drawn]),
        log_probability=_log_probabilities(samples),
        measured={name: len(getattr(samples, name)) for name in ("generated", "passed", "heldout", "unique")},
    )


@dataclass(frozen=True)
class Copied:
    """What of the generated documents occurs elsewhere.

    Attributes:
        repeated, in_seed: float64 [generated], as in `compare_with_seeds` returns them.
        letters: bool [generated], equal to the seed but for white space and punctuation.
        in_corpus, heldout_in_corpus: float64, share of the shingles of generated and of held-out documents that any unique
            document has.
        novel: see `novel_rates`.
    """

    repeated: np.ndarray
    in_seed: np.ndarray
    letters: np.ndarray
    in_corpus: np.ndarray
    heldout_in_corpus: np.ndarray
    novel: list[dict[str, Any]]


def _copies(config: RunConfig, prepared: PreparedCorpus, samples: Samples) -> Copied:
    width, seeds = config.filter.shingle_tokens, samples.written.column("seed")[samples.drawn]
    groups: list[Batch] = [batch_of(one) for one in (samples.generated, samples.passed, samples.heldout)]
    known = {tokens: known_counts(groups, prepared.unique, tokens) for tokens in sorted({*NOVEL_TOKENS, width})}
    repeated, in_seed = compare_with_seeds(prepared, seeds, *groups[0], width)
    return Copied(
        repeated=repeated,
        in_seed=in_seed,
        letters=same_letters(prepared, samples.written, samples.drawn),
        in_corpus=known_share(known[width][0]),
        heldout_in_corpus=known_share(known[width][2]),
        novel=novel_rates(*([known[tokens][group] for tokens in NOVEL_TOKENS] for group in (1, 2))),
    )


def _rates(config: RunConfig, samples: Samples, copied: Copied) -> dict[str, Any]:
    width, limit = config.filter.shingle_tokens, config.filter.copy_containment
    passed, heldout, unique = (
        [document[1:-1] for document in one] for one in (samples.passed, samples.heldout, samples.unique)
    )
    return {
        "repetition": rate(
            copied.repeated > 0,
            f"generated documents in which a run of {width} tokens occurs twice",
            np.array([repeated_share(body, width) > 0 for body in heldout]),
            "held-out documents",
        ),
        "duplicates": rate(
            near_duplicates(passed, width),
            f"of {len(passed)} kept documents, those with Jaccard similarity of {DUPLICATE_JACCARD} or more to another; the "
            "paper takes a million",
            near_duplicates(unique, width),
            f"{len(unique)} unique documents",
        ),
        "pair_copying": rate(copied.letters, "generated documents that equal their seed but for white space and punctuation"),
        "pair_containment": rate(
            copied.in_seed >= limit, f"generated documents with {limit:.0%} or more of their {width}-token runs in their seed"
        ),
        "corpus_copying": rate(
            copied.in_corpus >= limit,
            f"generated documents with {limit:.0%} or more of their {width}-token runs in the unique documents",
            copied.heldout_in_corpus >= limit,
            "held-out documents",
        ),
    }


def _lengths(samples: Samples, context: int) -> dict[str, list[int]]:
    edges = np.linspace(0, context, LENGTH_BINS + 1).astype(int)

    def histogram(documents: list[np.ndarray]) -> list[int]:
        return np.histogram(np.minimum([len(document) - 2 for document in documents], context), edges)[0].tolist()

    return {"edges": edges.tolist(), "synthetic": histogram(samples.passed), "real": histogram(samples.unique)}


def _log_probabilities(samples: Samples) -> dict[str, Any]:
    """Of the generated documents: the mean over documents of their mean log-probability in nats a token, and its histogram."""
    values = samples.written.column("mean_log_probability")[samples.drawn]
    values = values[np.isfinite(values)]
    counts, edges = np.histogram(values, PROBABILITY_BINS)
    return {"mean": float(values.mean()) if len(values) else None, "edges": edges.tolist(), "generated": counts.tolist()}


def _shares(values: np.ndarray) -> dict[str, float]:
    return {str(value): number / len(values) for value, number in sorted(Counter(values.tolist()).items())}


def _by_source(
    config: RunConfig, prepared: PreparedCorpus, samples: Samples, copied: Copied, judged: Judged, irrelevant: np.ndarray
) -> dict[str, Any]:
    """The rates among the documents whose seed is of each source.

    Args:
        irrelevant: of each judged document 1, 0, or NaN where that is not known.
    """
    of_seeds, limit = prepared.unique.sources, config.filter.copy_containment
    source, judged_source = of_seeds[samples.written.column("seed")[samples.drawn]], of_seeds[judged.seeds]
    lengths = np.array([len(document) - 2 for document in samples.generated])

    def of(name: str) -> dict[str, Any]:
        mine, looked_at = source == name, (judged_source == name) & ~np.isnan(irrelevant)
        return {
            "documents": int(mine.sum()),
            "mean_tokens": float(lengths[mine].mean()),
            "repetition": float((copied.repeated[mine] > 0).mean()),
            "pair_containment": float((copied.in_seed[mine] >= limit).mean()),
            "corpus_copying": float((copied.in_corpus[mine] >= limit).mean()),
            "judged": int(looked_at.sum()),
            "pair_irrelevance": float(irrelevant[looked_at].mean()) if looked_at.any() else None,
        }

    return {name: of(name) for name in sorted(set(source.tolist()))}


def _write_judged(
    prepared: PreparedCorpus,
    kept: Corpus,
    judged: Judged,
    similar: dict[str, np.ndarray],
    verdicts: dict[str, np.ndarray],
    directory: Path,
) -> None:
    columns = {
        "id": kept.ids[judged.documents],
        "source": prepared.unique.sources[judged.seeds],
        "seed": judged.seeds,
        "elsewhere": judged.elsewhere,
        "neighbour": judged.neighbours,
        "mean_log_probability": kept.column("mean_log_probability")[judged.documents],
        **{f"similarity_{name}": values for name, values in similar.items()},
        **{f"judged_{name}": pa.array(values == 1, mask=np.isnan(values)) for name, values in verdicts.items()},
    }
    with atomic_path(directory / JUDGED) as temporary:
        pq.write_table(pa.table(columns), temporary)
