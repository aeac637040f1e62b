"""The control of the stage `pair`: the seeds of related pairs with shuffled partners."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError
from sbp_fast.pairs.pairset import PairSet, write_pairs
from sbp_fast.pairs.random_pairs import shuffle_partners
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage


def pair_at_random(
    config: RunConfig, out: Path, *, corpus: Path, pairs: Path, console: Console, force: bool = False
) -> Manifest:
    """Write as many pairs as are related, of the same seeds, whose documents are not related (see `shuffle_partners`).

    The table `pairs.parquet` has the columns of related pairs; the scores are null, since they were not measured.

    Args:
        config: of the run.
        out: directory of the output.
        corpus: output of `prepare`.
        pairs: output of `pair` on it, with related pairs.
        console: for progress.
        force: replace an output that was made from other settings or inputs.

    Raises:
        UserError: the pairs cannot be shuffled, as where every document is related to every other.
    """

    def body(context: StageContext) -> None:
        related = PairSet(pairs)
        try:
            partners = shuffle_partners(related.seeds, related.partners, config.seed)
        except ValueError as error:
            raise UserError(pairs, str(error), "leave out the arms with random pairs") from None
        scores = pa.nulls(len(partners), pa.float32())
        write_pairs(context.directory, [(related.seeds, partners, scores)])
        context.record(pairs=len(partners))

    return run_stage(
        "pair",
        out,
        config={"seed": config.seed, "pairs": "random"},
        inputs={"corpus": corpus, "pairs": pairs},
        body=body,
        console=console,
        force=force,
    )
