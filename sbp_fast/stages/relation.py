"""The stage `relation`: nats a token of held-out true partners given their own seed, another seed, and none."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import torch

from sbp_fast.config import RunConfig, resolve_device, resolve_threads
from sbp_fast.data.prepared import PreparedCorpus
from sbp_fast.errors import UserError
from sbp_fast.evaluate.relation import measure_pairs, summarize, usable_pairs
from sbp_fast.evaluate.scoring import check_vocabulary
from sbp_fast.model.saved import load_model
from sbp_fast.pairs.heldout_pairs import HeldoutPairs
from sbp_fast.pipeline.files import atomic_path
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage

RELATION = "relation.parquet"


def measure_relation(
    config: RunConfig, out: Path, *, corpus: Path, pairs: Path, model: Path, console: Console, force: bool = False
) -> Manifest:
    """Measure what a synthesizer learnt of the relation between documents, on pairs of test documents that it never saw.

    Writes `relation.parquet`, a row a pair (see `measure_pairs`); the manifest's counts are those of `summarize`, with the
    numbers of pairs left out.

    Args:
        config: of the run.
        out: directory of the output.
        corpus: output of `prepare`.
        pairs: output of `pair`, with its pairs of held-out documents.
        model: directory of the synthesizer.
        console: for progress.
        force: replace an output that was made from other settings or inputs.

    Raises:
        UserError: an input is not finished, the pairs are of another corpus, the model has another vocabulary or gives
            likelihoods that are not finite.
    """

    def body(context: StageContext) -> None:
        prepared = PreparedCorpus(corpus)
        if Manifest.load(pairs, hashed=False).inputs.get("corpus") != prepared.fingerprint:
            raise UserError(pairs, f"was not made from {corpus}", "give the output of pair on it")
        torch.set_num_threads(resolve_threads(config))
        context.device = resolve_device(config)
        synthesizer = load_model(model, context.device)
        check_vocabulary(synthesizer, prepared, model.name)
        usable, left_out = usable_pairs(prepared, HeldoutPairs.load(pairs), synthesizer.config.context)
        table, context.flops = measure_pairs(synthesizer, prepared, usable, context.console)
        with atomic_path(context.directory / RELATION) as temporary:
            pq.write_table(table, temporary)
        context.record(**summarize(table, config.compare.confidence, config.seed), **left_out)

    return run_stage(
        "relation",
        out,
        config={"compare": config.compare.settings(), "seed": config.seed},
        inputs={"corpus": corpus, "pairs": pairs, "model": model},
        body=body,
        console=console,
        force=force,
    )
