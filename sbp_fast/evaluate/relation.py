"""Whether a synthesizer learnt a relation: what it makes of true partners that it never saw, given their seed or another.

The nats a token of held-out partners are measured given their own seed, given the seed of another pair, and given none. What
another seed costs more than the own one is what the seed tells of its partner: two documents of the corpus have a language, a
length and a format in common with either. Without a seed the partner stands alone, in the form of plain documents. Tuning shows
the synthesizer no such text, so that difference also holds what tuning made it forget.

The intervals are over documents. They are about one synthesizer: with several synthesizer runs, the unit of replication of a
claim about the method is the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.bootstrap import interval, ratio, resample_pair_sums
from sbp_fast.evaluate.likelihood import Tree, document_trees, log_likelihoods, pair_trees
from sbp_fast.model.flops import forward_flops
from sbp_fast.model.transformer import Transformer
from sbp_fast.pairs.heldout_pairs import MINIMUM_PAIRS, NO_SEED, HeldoutPairs
from sbp_fast.pipeline.progress import Console

CONDITIONS = ("own", "other", "none")
"""The seed that a partner is predicted from: its own, that of another pair, or none."""
PAIRS_AT_ONCE = 8192  # whose tokens are in memory
BOOTSTRAP_SAMPLES = 2000


def usable_pairs(prepared: PreparedCorpus, pairs: HeldoutPairs, context: int) -> tuple[HeldoutPairs, dict[str, int]]:
    """Return the test pairs that can be measured, and the number of those left out for each reason.

    Left out are partners longer than a context, which a synthesizer is not tuned on either, and pairs without another seed.
    """
    test = pairs.of_split("test")
    too_long = np.diff(prepared.heldout.offsets)[test.partners] > context
    alone = ~too_long & (test.other_seeds == NO_SEED)
    return test.select(~too_long & ~alone), {"partners_too_long": int(too_long.sum()), "without_other_seed": int(alone.sum())}


def measure_pairs(
    model: Transformer, prepared: PreparedCorpus, pairs: HeldoutPairs, console: Console
) -> tuple[pa.Table, float]:
    """Return the nats of each partner under each condition, and the FLOPs of the forward passes.

    Args:
        model: the synthesizer.
        prepared: the corpus.
        pairs: from `usable_pairs`.
        console: shows the progress.

    Returns:
        A row a pair: seed, partner, other_seed (int64, indices of held-out documents), tokens (int64, the partner's predicted
        ones: all but its first, the end token included), nats_own, nats_other, nats_none (float64).

    Raises:
        UserError: the model's likelihoods are not finite.
    """
    distinct, indices = np.unique(pairs.partners, return_inverse=True)
    conditions = ((pairs.seeds, pairs.partners), (pairs.other_seeds, pairs.partners))
    seeds, partners = (np.concatenate(documents) for documents in zip(*conditions, strict=True))
    flops = 0.0
    with console.task("partners scored", len(seeds) + len(distinct), "partners") as task:

        def score(trees: list[Tree], partners: int) -> np.ndarray:
            nonlocal flops
            sums, extent = log_likelihoods(model, trees, partners)
            flops += forward_flops(model.config, model.vocabulary_size, extent.tokens, extent.visible_pairs, extent.predictions)
            task.advance(partners)
            return -sums

        given, alone = np.empty(len(seeds)), np.empty(len(distinct))
        for part in _parts(np.argsort(seeds, kind="stable")):  # those of a seed together, whichever pair it is the seed of
            context, token = model.config.context, prepared.tokenizer.partner
            given[part] = score(pair_trees(prepared.heldout, seeds[part], partners[part], token, context), len(part))
        for part in _parts(np.arange(len(distinct))):
            documents = [prepared.heldout[int(document)] for document in distinct[part]]
            alone[part] = score(document_trees(documents, model.config.context), len(part))
    nats = dict(zip(CONDITIONS, (*np.split(given, 2), alone[indices]), strict=True))
    if not all(np.isfinite(values).all() for values in nats.values()):
        raise UserError("model", "gives likelihoods that are not finite", "train it again with a lower learning rate")
    columns = {"seed": pairs.seeds, "partner": pairs.partners, "other_seed": pairs.other_seeds}
    columns |= {"tokens": np.diff(prepared.heldout.offsets)[pairs.partners] - 1}
    return pa.table(columns | {f"nats_{name}": values for name, values in nats.items()}), flops


def _parts(order: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(order), PAIRS_AT_ONCE):
        yield order[start : start + PAIRS_AT_ONCE]


def summarize(table: pa.Table, confidence: float, seed: int, samples: int = BOOTSTRAP_SAMPLES) -> dict[str, Any]:
    """Return the nats a token under each condition and the paired differences to the own seed, with intervals.

    A rate is a ratio of sums: nats of all partners over their tokens. The intervals are percentile bootstraps over documents
    (`resample_pair_sums`), shared by all rates. Resamples without any pair are left out.

    Args:
        table: from `measure_pairs`.
        confidence: coverage of the intervals.
        seed: seed of the bootstrap.
        samples: number of resamples.

    Returns:
        `nats` (condition -> interval) and `gain` ("other", "none" -> interval of its nats less those given the own seed); both
        are None with fewer pairs than `MINIMUM_PAIRS`. Beside them the numbers that they rest on.
    """
    documents = {name: table[name].to_numpy() for name in ("seed", "partner", "other_seed", "tokens")}
    counts = {
        "pairs": table.num_rows,
        "partners": len(np.unique(documents["partner"])),
        "documents": len(np.unique(np.concatenate([documents["seed"], documents["partner"]]))),
        "tokens": int(documents["tokens"].sum()),
        "minimum_pairs": MINIMUM_PAIRS,
        "confidence": confidence,
        "bootstrap_samples": samples,
    }
    if table.num_rows < MINIMUM_PAIRS:
        return counts | {"nats": None, "gain": None}
    own, other, none = (table[f"nats_{name}"].to_numpy() for name in CONDITIONS)
    numerators = [own, other, none, other - own, none - own]
    columns = np.stack([*numerators, *[documents["tokens"].astype(np.float64)] * len(numerators)], axis=1)
    sums = resample_pair_sums(columns, documents["seed"], documents["partner"], samples, seed)
    values, resampled = ratio(columns.sum(0)), ratio(sums[sums[:, -1] > 0])
    intervals = [interval(value, resampled[:, index], confidence) for index, value in enumerate(values)]
    return counts | {
        "nats": dict(zip(CONDITIONS, intervals[:3], strict=True)),
        "gain": dict(zip(CONDITIONS[1:], intervals[3:], strict=True)),
    }
