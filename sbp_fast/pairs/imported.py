"""Pairs whose relation is known, read from a file that names documents by their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sbp_fast.config import RunConfig
from sbp_fast.data.by_id import DocumentIds, read_id, read_records
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.readers import Fields
from sbp_fast.data.shuffle import hash_name
from sbp_fast.errors import UserError
from sbp_fast.pairs.heldout_pairs import MINIMUM_PAIRS, NO_SEED, HeldoutPairs, PairSplit, assign_other_seeds
from sbp_fast.pairs.pairset import write_pairs

FIELDS = Fields("partner", "seed", "similarity")
REMEDY = "give JSON lines or Parquet with the ids seed and partner, and perhaps a similarity"
LARGEST_SIMILARITY = float(np.finfo(np.float32).max)  # as it is stored
KNOWN_SIMILARITY = 1.0
"""Similarity of a pair of which the file gives none."""


@dataclass(frozen=True)
class NamedPair:
    """A pair as a file names it; `where` is its file and record, for messages."""

    seed: str
    partner: str
    similarity: float
    where: str


def import_pairs(config: RunConfig, prepared: PreparedCorpus, directory: Path) -> dict[str, Any]:
    """Write the pairs of `pair.file` as the search for pairs writes those that it finds.

    Args:
        config: its `pair.file` and `seed`.
        prepared: the corpus that the ids name documents of.
        directory: of the stage.

    Returns:
        Counts for the manifest: `pairs`, `seeds`, `repeated` pairs, of which one stays, and under `heldout` those of
        `find_heldout_pairs`, with `across_splits`, pairs of a validation document with a test document, which are left out.

    Raises:
        UserError: a record that is no pair, an id of no unique and no held-out document or of both kinds, a pair of one
            document with itself or of a unique document with a held-out one; no pair of unique documents.
    """
    ids = DocumentIds(prepared)
    rows: dict[bool, list[tuple[int, int, float]]] = {False: [], True: []}  # by whether the documents are held out
    for pair in read_pairs(config.pair.file):
        heldout, seed, partner = _find(ids, pair)
        rows[heldout].append((seed, partner, pair.similarity))
    real, repeated = _sorted(rows[False])
    if not len(real[0]):
        raise UserError("pair.file", "has no pair of unique documents", "give pairs of documents that the synthesizer may read")
    write_pairs(directory, [real])
    heldout_pairs, counts = _heldout(prepared, rows[True], config.seed)
    heldout_pairs.write(directory)
    return {"pairs": len(real[0]), "seeds": len(np.unique(real[0])), "repeated": repeated, "heldout": counts}


def read_pairs(path: str | tuple[str, ...]) -> Iterator[NamedPair]:
    """Yield the pairs of files.

    Raises:
        UserError: a file that cannot be read, or a record that is no pair.
    """
    for where, values in read_records(path, FIELDS, REMEDY):
        yield _named(values, where)


def _named(values: Mapping[str, Any], where: str) -> NamedPair:
    similarity = _as_number(values.get(FIELDS.source))
    seed, partner = (read_id(values, field, where, f"a pair without a {field}", REMEDY) for field in (FIELDS.id, FIELDS.text))
    if similarity is not None and not (isinstance(similarity, int | float) and abs(similarity) <= LARGEST_SIMILARITY):
        raise UserError(where, f"a similarity that is no number: {similarity!r}", REMEDY)
    if seed == partner:
        raise UserError(where, f"pairs the document {seed!r} with itself", "remove it")
    return NamedPair(seed, partner, KNOWN_SIMILARITY if similarity is None else float(similarity), where)


def _as_number(value: Any) -> Any:
    """Return the number that a text spells, as in CSV; None for an empty one; any other value as it is."""
    try:
        return (float(value) if value else None) if isinstance(value, str) else value
    except ValueError:
        return value


def _find(ids: DocumentIds, pair: NamedPair) -> tuple[bool, int, int]:
    """Return whether the documents of a pair are held out, and the indices of its seed and its partner."""
    documents = []
    for id in (pair.seed, pair.partner):
        document = ids.find(id, pair.where)
        if document is None:
            remedy = "give ids of documents that prepare made unique or held out"
            raise UserError(pair.where, f"no unique and no held-out document has the id {id!r}", remedy)
        documents.append(document)
    seed, partner = documents
    if seed.heldout != partner.heldout:
        heldout, unique = (pair.seed, pair.partner) if seed.heldout else (pair.partner, pair.seed)
        problem = f"pairs the held-out document {heldout!r} with the unique document {unique!r}"
        raise UserError(pair.where, problem, "give pairs within the unique documents, or within the held-out ones")
    return seed.heldout, seed.row, partner.row


def _sorted(rows: list[tuple[int, int, float]]) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], int]:
    """Return seeds, partners and similarities by (seed, falling similarity, partner), and the number of repeated pairs.

    Of a repeated pair the greatest similarity stays.
    """
    seeds, partners = (np.array([row[column] for row in rows], np.int64) for column in (0, 1))
    scores = np.array([row[2] for row in rows], np.float32)
    order = np.lexsort((-scores, partners, seeds))
    first = np.ones(len(order), bool)
    first[1:] = (np.diff(seeds[order]) != 0) | (np.diff(partners[order]) != 0)
    chosen = order[first]
    chosen = chosen[np.lexsort((partners[chosen], -scores[chosen], seeds[chosen]))]
    return (seeds[chosen], partners[chosen], scores[chosen]), len(order) - len(chosen)


def _heldout(prepared: PreparedCorpus, rows: list[tuple[int, int, float]], seed: int) -> tuple[HeldoutPairs, dict[str, Any]]:
    """Return the pairs of held-out documents, each within a split, and their counts."""
    (seeds, partners, scores), repeated = _sorted(rows)
    size, ids = len(prepared.heldout), prepared.heldout.ids
    related = seeds * size + partners

    def unrelated(seeds: np.ndarray, partners: np.ndarray) -> np.ndarray:
        return (seeds != partners) & ~np.isin(seeds * size + partners, related)

    parts, counts = list[HeldoutPairs](), dict[str, Any](repeated=repeated)
    for split in get_args(PairSplit):
        documents = getattr(prepared, split)
        inside = np.isin(seeds, documents) & np.isin(partners, documents)
        names = (f"{ids[seed]}\n{ids[partner]}" for seed, partner in zip(seeds[inside], partners[inside], strict=True))
        keys = np.array([hash_name(name, seed) for name in names], np.uint64)
        others = assign_other_seeds(seeds[inside], partners[inside], unrelated, keys)
        parts.append(HeldoutPairs(seeds[inside], partners[inside], scores[inside], np.full(inside.sum(), split), others))
        counts[split] = {
            "documents": len(documents),
            "searched": len(documents),
            "pairs": int(inside.sum()),
            "without_other_seed": int((others == NO_SEED).sum()),
            "too_few": bool(inside.sum() < MINIMUM_PAIRS),
        }
    pairs = HeldoutPairs.concatenate(parts)
    return pairs, counts | {"across_splits": len(seeds) - len(pairs)}
