"""How often and on how much text the held-out loss of a model is measured while it trains."""

from __future__ import annotations

from typing import Annotated

from sbp_fast.config.section import NO_EFFECT, Count, CountOrZero, Section


class ValidationConfig(Section):
    """Measurements on validation documents during training, which change neither the weights of any step nor their order.

    Only a run with `select = "best"` depends on them: they decide which of its weights are its output.
    """

    points: CountOrZero = 10
    """Evenly spaced times in a run at which the held-out loss is measured, the last at the end (0: never)."""
    tokens: Count = 8192
    """Read at most this many tokens of validation documents each time, the same ones each time, and at least one document."""
    samples: Annotated[CountOrZero, NO_EFFECT] = 2
    """Short texts generated each time, into `samples.jsonl` (0: none)."""
