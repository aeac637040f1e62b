"""Examples for the report's browser: a seed, its true partner and what the synthesizer wrote after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.experiment.graph import FILTER, PAIR, PREPARE, SYNTHESIZE
from sbp_fast.pairs.pairset import PairSet

KEPT, REJECTED = 20, 12
EXAMINED = 20_000  # documents of the synthetic corpus that examples are drawn from


def collect_triples(run_directory: Path) -> list[dict[str, Any]]:
    """Kept and rejected documents of a run, each of another seed while there are enough, every reason in turn.

    Returns:
        Dictionaries with `seed`, `partner` (None where the seed has none), `synthesized` (texts), `seed_id`, `partner_id`,
        `score`, `tokens` and `reason` (None for a kept document). The same run gives the same examples.
    """
    corpus, pairs = PreparedCorpus(run_directory / PREPARE), PairSet(run_directory / PAIR)
    synthetic = Corpus(run_directory / SYNTHESIZE)
    reasons = _reasons(run_directory / FILTER / "rejected.parquet")
    seeds, written = synthetic.column("seed"), synthetic.ids
    best = {seed: place for place, seed in reversed(list(enumerate(pairs.seeds.tolist())))}  # the first is the most similar
    drawn = np.random.default_rng(0).permutation(len(synthetic))[:EXAMINED].tolist()
    order = sorted(drawn, key=lambda document: int(seeds[document]) not in best)  # seeds with a partner first
    by_reason: dict[str | None, list[int]] = {}
    for document in order:
        by_reason.setdefault(reasons.get(written[document]), []).append(document)
    kept = _of_different_seeds(by_reason.pop(None, []), seeds)[:KEPT]
    rejected = _in_turn([_of_different_seeds(by_reason[reason], seeds) for reason in sorted(by_reason, key=str)])
    ids, triples = corpus.unique.ids, []
    for document in [*kept, *rejected[:REJECTED]]:
        seed = int(seeds[document])
        place = best.get(seed)
        partner = None if place is None else int(pairs.partners[place])
        triples.append(
            {
                "seed": corpus.text(corpus.unique, seed),
                "seed_id": str(ids[seed]),
                "partner": None if partner is None else corpus.text(corpus.unique, partner),
                "partner_id": None if partner is None else str(ids[partner]),
                "score": None if place is None else float(pairs.scores[place]),
                "synthesized": corpus.text(synthetic, document),
                "tokens": len(synthetic[document]),
                "reason": reasons.get(written[document]),
            }
        )
    return triples


def _reasons(path: Path) -> dict[str, str]:
    """Id of each rejected document -> why it was rejected."""
    table = pq.read_table(path)
    return dict(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))


def _of_different_seeds(documents: list[int], seeds: np.ndarray) -> list[int]:
    """First one document of each seed, then the rest."""
    seen: set[int] = set()
    first: list[int] = []
    again: list[int] = []
    for document in documents:
        (again if int(seeds[document]) in seen else first).append(document)
        seen.add(int(seeds[document]))
    return first + again


def _in_turn(lists: list[list[int]]) -> list[int]:
    """One of each list, then the next of each."""
    longest = max(map(len, lists), default=0)
    return [one[place] for place in range(longest) for one in lists if place < len(one)]
