"""The report's sentences about what the synthesizer learnt of the relation between documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sbp_fast.experiment.report.wording import excludes_zero, number

NATS: Mapping[str, Any] = {"label": "Nats a token", "better": "lower", "digits": 4, "percent": False, "chance": None}
"""How nats a token are shown, in the form of a metric's description."""


def relation_sentences(relation: Mapping[str, Any]) -> list[str]:
    """Return what the difference between own and other seeds means, and what its interval covers.

    Args:
        relation: the entry of `results.json` (see `sbp_fast.evaluate.relation.summarize`).
    """
    if relation["gain"] is None:
        return [f"Not measured: {relation['pairs']} pairs of test documents are fewer than {relation['minimum_pairs']}."]
    gain = relation["gain"]["other"]
    value, low, high = (number(gain[key], NATS, signed=True) for key in ("value", "low", "high"))
    shown = f"{value} [{low}, {high}] nats a token"
    if not excludes_zero(gain):
        meaning = "the interval includes zero, so the seed explains nothing of the partner that these pairs can show"
    elif gain["value"] > 0:
        meaning = "so much does the seed tell the synthesizer about its partner"
    else:
        meaning = "the seed explains nothing of the partner, and misleads"
    return [
        f"Given the seed of another pair instead of its own, a partner that the synthesizer never saw costs {shown}: "
        f"{meaning}.",
        "The intervals are over documents. They are about this synthesizer, not about the luck of a training run.",
    ]
