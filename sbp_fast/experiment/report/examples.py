"""Examples for the report: a seed, its true partner and a synthetic document generated after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.experiment.graph import PREPARE
from sbp_fast.experiment.sources import Source
from sbp_fast.pairs.pairset import PairSet

PASSED, REJECTED = 20, 12  # examples
EXAMINED = 20_000  # synthetic documents that examples are chosen from


def collect_triples(run_directory: Path, source: Source) -> list[dict[str, Any]]:
    """Return filtered and rejected documents of a source of a run, of different seeds where possible, reject reasons in turn.

    Returns:
        Dictionaries with `seed`, `partner` (None where the seed has none), `synthesized` (texts), `seed_id`, `partner_id`,
        `score`, `tokens` and `reason` (None for a filtered document). The same run gives the same examples.
    """
    corpus, pairs = PreparedCorpus(run_directory / PREPARE), PairSet(run_directory / source.related)
    synthetic = Corpus(run_directory / source.synthesize)
    reasons = _reasons(run_directory / source.filter / "rejected.parquet")
    seeds, written = synthetic.column("seed"), synthetic.ids
    best = {seed: index for index, seed in reversed(list(enumerate(pairs.seeds.tolist())))}  # the first is the most similar
    examined = np.random.default_rng(0).permutation(len(synthetic))[:EXAMINED].tolist()
    order = sorted(examined, key=lambda document: int(seeds[document]) not in best)  # seeds with a partner first
    by_reason: dict[str | None, list[int]] = {}
    for document in order:
        by_reason.setdefault(reasons.get(written[document]), []).append(document)
    passed = _of_different_seeds(by_reason.pop(None, []), seeds)[:PASSED]
    rejected = _in_turn([_of_different_seeds(by_reason[reason], seeds) for reason in sorted(by_reason, key=str)])
    ids, triples = corpus.unique.ids, []
    for document in [*passed, *rejected[:REJECTED]]:
        seed = int(seeds[document])
        pair = best.get(seed)
        partner = None if pair is None else int(pairs.partners[pair])
        triples.append(
            {
                "seed": corpus.text(corpus.unique, seed),
                "seed_id": str(ids[seed]),
                "partner": None if partner is None else corpus.text(corpus.unique, partner),
                "partner_id": None if partner is None else str(ids[partner]),
                "score": None if pair is None else float(pairs.scores[pair]),
                "synthesized": corpus.text(synthetic, document),
                "tokens": len(synthetic[document]),
                "reason": reasons.get(written[document]),
            }
        )
    return triples


def _reasons(path: Path) -> dict[str, str]:
    """Return the id of each rejected document -> its reject reason."""
    table = pq.read_table(path)
    return dict(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def _of_different_seeds(documents: list[int], seeds: np.ndarray) -> list[int]:
    """Return the documents with the first one of each seed in front."""
    seen: set[int] = set()
    first: list[int] = []
    again: list[int] = []
    for document in documents:
        (again if int(seeds[document]) in seen else first).append(document)
        seen.add(int(seeds[document]))
    return first + again


def _in_turn(lists: list[list[int]]) -> list[int]:
    """Return the first element of each list, then the second of each, and so on."""
    longest = max(map(len, lists), default=0)
    return [items[index] for index in range(longest) for items in lists if index < len(items)]
