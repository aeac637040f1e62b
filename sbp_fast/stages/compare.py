"""The stage `compare`: arms compared by the scores that `evaluate` wrote; a new arm needs no other model scored again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from sbp_fast.config import RunConfig
from sbp_fast.errors import UserError
from sbp_fast.evaluate.comparison import compare_scores
from sbp_fast.pipeline.manifest import Manifest
from sbp_fast.pipeline.progress import Console
from sbp_fast.pipeline.stage import StageContext, run_stage
from sbp_fast.stages.evaluate import SCORES


def compare(
    config: RunConfig, out: Path, *, scores: Mapping[str, Sequence[Path]], console: Console, force: bool = False
) -> Manifest:
    """Compare arms; the manifest's counts hold values, differences to the first arm, and shares of the oracles' gains.

    Args:
        config: of the run.
        out: directory of the output.
        scores: arm -> outputs of `evaluate`, one for each of its training runs; the first arm is the baseline. Arms that the
            configuration lets read all documents are oracles.
        console: for progress.
        force: replace an output that was made from other settings or inputs.

    Raises:
        UserError: an input is not finished, or the models were measured by different metrics or on different items.
    """

    def body(context: StageContext) -> None:
        directories = [directory for runs in scores.values() for directory in runs]
        manifests = {directory: Manifest.load(directory, "evaluate", hashed=False) for directory in directories}
        metrics = next(iter(manifests.values())).counts["metrics"]
        for directory, manifest in manifests.items():
            if manifest.counts["metrics"] != metrics:
                known = f"{', '.join(manifest.counts['metrics'])}, not by {', '.join(metrics)}"
                raise UserError(directory, f"was measured by {known}", "evaluate all models with the same settings")
        tables = {arm: [pq.read_table(directory / SCORES) for directory in runs] for arm, runs in scores.items()}
        oracles = [arm for arm in scores if arm in config.arms and config.arms[arm].data == "all"]
        context.record(**compare_scores(tables, metrics, oracles, config.compare.confidence))

    inputs = {f"{arm} {number}": directory for arm, runs in scores.items() for number, directory in enumerate(runs)}
    return run_stage(
        "compare",
        out,
        config={
            "compare": config.compare.settings(),
            "arms": {arm: config.arms[arm].data if arm in config.arms else "" for arm in scores},
        },
        inputs=inputs,
        body=body,
        console=console,
        force=force,
    )
