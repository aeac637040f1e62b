"""Gates before any arm is judged: what a synthesizer learnt, and what its samples tell, beside what is exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.evaluate.likelihood import log_likelihoods
from sbp_fast.lab.metrics import read_corpus, value_tree
from sbp_fast.lab.worlds import FACTS, JOINED, World
from sbp_fast.model.transformer import Transformer
from sbp_fast.pairs.heldout_pairs import HeldoutPairs


def conditional_loss(world: World, model: Transformer, prepared: PreparedCorpus, pairs: HeldoutPairs) -> dict[str, Any]:
    """Return the nats a value of held-out J1 documents of unlinked concepts, each given a held-out B1 document of its concept.

    Returns:
        `conditional`, the synthesizer's; `exact`, of the posterior predictive given the seed's tellings, on the same pairs;
        `entropy`, of the noise alone; `uniform`, of one who knows nothing; and the number of `pairs`.
    """
    told = read_corpus(world, prepared, prepared.heldout)
    asked = (told.genres[pairs.seeds] != JOINED) & (told.genres[pairs.partners] == JOINED)
    asked &= ~world.linked[told.concepts[pairs.partners]]
    pairs = pairs.select(asked)
    trees = []
    for owner, (seed, partner) in enumerate(zip(pairs.seeds.tolist(), pairs.partners.tolist(), strict=True)):
        document = prepared.heldout[partner].astype(np.int64)
        document[0] = prepared.tokenizer.partner
        trees.append(value_tree(document, owner, [prepared.heldout[seed]]))
    nats, _ = log_likelihoods(model, trees, len(pairs))
    predicted = world.predictive(told.values[pairs.seeds].reshape(-1, 1))
    exact = np.log(predicted[np.arange(len(predicted)), told.values[pairs.partners].ravel()])
    return {
        "conditional": float(-nats.sum() / (FACTS * len(pairs))),
        "exact": float(-exact.mean()),
        "entropy": world.entropy,
        "uniform": world.uniform,
        "pairs": len(pairs),
    }


def sample_figures(world: World, prepared: PreparedCorpus, synthetic: Corpus) -> dict[str, Any]:
    """Return shares among generated documents.

    Returns:
        `documents`, their number; `well_formed`, the share that are documents of the world; of these `kept_name`, that are of
        their seed's concept (None without seeds), and `missing_kind`, that are J1 documents of a known, unlinked concept; of
        the last `missing_kept_name`, of their seed's concept, and `missing_right_values`, the share of their values that are
        true (1 / values by chance; None where there are no such documents).
    """
    told, well_formed = world.read([prepared.text(synthetic, index) for index in range(len(synthetic))])
    seeds = synthetic.column("seed")
    concepts = np.append(read_corpus(world, prepared, prepared.unique).concepts, -2)  # index -1 stands for no seed
    kept = told.concepts == concepts[seeds]
    missing = (told.concepts >= 0) & (told.genres == JOINED) & ~world.linked[told.concepts]
    right = told.values == world.facts(told)
    seeded = bool((seeds >= 0).any())
    return {
        "documents": len(synthetic),
        "well_formed": float(well_formed.mean()),
        "kept_name": _share(kept[well_formed]) if seeded else None,
        "missing_kind": _share(missing[well_formed]),
        "missing_kept_name": _share(kept[missing]) if seeded else None,
        "missing_right_values": _share(right[missing]),
        "chance": 1 / world.settings.values,
    }


def gate_sentence(source: str, conditional: Mapping[str, Any] | None, samples: Mapping[str, Any]) -> str:
    """Return a line with the figures of a source: of its synthesizer, if it has one, and of its samples."""
    learnt = ""
    if conditional:
        learnt = f"conditional loss {conditional['conditional']:.3f} nats a value (exact {conditional['exact']:.3f}), "
    right, chance = samples["missing_right_values"], f"{samples['chance']:.1%} by chance"
    told = "no sample of the missing kind" if right is None else f"{right:.1%} of the missing kind's values right ({chance})"
    kept = "" if samples["kept_name"] is None else f"name kept in {samples['kept_name']:.1%}, "
    return f"gate of {source}: {learnt}{kept}{told}"


def _share(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
