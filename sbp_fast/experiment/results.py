"""The file `results.json`: every number of a run, read from the manifests of its stages and the metrics of its trainings."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbp_fast import __version__
from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.config.sources import ELSEWHERE
from sbp_fast.errors import UserError
from sbp_fast.evaluate.statistics import no_share
from sbp_fast.experiment.arms import Arm, arms_of
from sbp_fast.experiment.graph import (
    COMPARE,
    EMBED,
    PREPARE,
    model_stage,
    quality_stage,
    relation_stage,
    stages_of,
)
from sbp_fast.experiment.ledger import ledger, matched_compute, stages_of_arm, totals, training_flops
from sbp_fast.experiment.sources import Source, used_sources
from sbp_fast.pipeline.files import write_json
from sbp_fast.pipeline.manifest import MANIFEST, Manifest
from sbp_fast.train.log import METRICS, read_lines

RESULTS = "results.json"
BITS_PER_BYTE = "validation/bits_per_byte"


def write_results(run_directory: Path) -> dict[str, Any]:
    """Write `results.json` of a finished run and return its content."""
    results = collect(run_directory)
    write_json(Path(run_directory) / RESULTS, results)
    return results


def collect(run_directory: str | Path, *, hashed: bool = True) -> dict[str, Any]:
    """Return the numbers of a finished run.

    The same run gives the same dictionary, except for `seconds` and the versions of the software.

    Args:
        run_directory: that `sbp-fast run` wrote.
        hashed: whether to hash the files of its stages, which may be terabytes.

    Raises:
        UserError: a stage is not finished, or the directory is no run.
    """
    run_directory = Path(run_directory)
    if not (run_directory / "config.toml").is_file():
        raise UserError(run_directory, "is no run", "give the directory that `sbp-fast run` wrote")
    config = load_config([run_directory / "config.toml"])
    arms = arms_of(config)
    manifests = {name: _manifest(run_directory / name, name, hashed=hashed) for name in stages_of(config)}
    counts = {name: manifest.counts for name, manifest in manifests.items()}
    comparison = counts[COMPARE]
    return {
        "run": {
            "name": config.name,
            "seed": config.seed,
            "device": manifests[model_stage(arms[config.baseline], config.baseline)].device,
            "versions": _versions(),
            "config": config.model_dump(mode="json"),
        },
        "baseline": config.baseline,
        "confidence": comparison["confidence"],
        "corpus": counts[PREPARE],
        "metrics": comparison["metrics"],
        "arms": {name: _arm(config, arm, manifests, run_directory) for name, arm in arms.items()},
        "sources": {name: _source(source, counts) for name, source in used_sources(config).items()},
        "oracle_ratio": counts[PREPARE]["tokens"] / counts[PREPARE]["unique_tokens"],
        "recovered_share_of_oracle": _shares_of_gain(comparison, counts[model_stage(arms[config.baseline], config.baseline)]),
        "ledger": ledger(config, manifests),
        "totals": totals(manifests),
        "matched": matched_compute(config, manifests),
    }


def _source(source: Source, counts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of the stages that make the documents of a source; quality only where documents have seeds."""
    quality = counts.get(quality_stage(source), {})  # none without seeds, and for known pairs
    results = {
        "pairs_kind": source.settings.pairs,
        "start": f"{ELSEWHERE}{Path(source.settings.model).name}" if source.imports else source.start,
        "stitched": source.settings.stitched,
        "synthesis": counts[source.synthesize],
        "synthetic_quality": counts[source.filter] | quality,
    }
    if source.synthesizer:
        results |= {
            "pairs": counts[source.related] | ({"embedding": counts[EMBED]} if EMBED in counts else {}),
            "tuning_pairs": counts[source.pair]["pairs"],
            "synthesizer": counts[source.synthesizer],
            "relation": counts[relation_stage(source)],
        }
    return results


def _shares_of_gain(comparison: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """Return the shares of the oracles' gains; they mean nothing where the baseline did not repeat its text."""
    shares: dict[str, Any] = comparison["recovered_share_of_oracle"]
    if baseline["sources"]["real"]["epochs"] > 1:
        return shares
    reason = no_share("the baseline read its text once at most, so there is no cost of repetition to win back")
    return {
        oracle: {arm: dict.fromkeys(by_metric, reason) for arm, by_metric in by_arm.items()}
        for oracle, by_arm in shares.items()
    }


def _manifest(directory: Path, stage: str, *, hashed: bool) -> Manifest:
    if not (directory / MANIFEST).is_file():
        raise UserError(directory, f"the stage {stage} is not finished", "rerun `sbp-fast run`: it resumes where it stopped")
    return Manifest.load(directory, hashed=hashed)


def _versions() -> dict[str, str]:
    return {
        "sbp_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _arm(config: RunConfig, arm: Arm, manifests: dict[str, Manifest], run_directory: Path) -> dict[str, Any]:
    """Return the tokens, compute and scores of an arm; counts are those of its first training run."""
    training, corpus = manifests[model_stage(arm, arm.name)], manifests[PREPARE].counts
    comparison = manifests[COMPARE].counts
    counts, needed = training.counts, stages_of_arm(stages_of(config), arm)
    real, synthetic = counts["sources"]["real"], counts["sources"].get("synthetic", {"tokens": 0})
    available = corpus["tokens"] if arm.settings.data == "all" else corpus["unique_tokens"]
    return {
        "label": arm.label,
        "data": arm.settings.data,
        "order": arm.settings.order,
        "synthetic": arm.settings.synthetic,
        "recipes_tried": arm.recipes_tried,
        "recipe": counts["choice"]["recipe"] if arm.candidates else arm.settings.recipe,
        "training_runs": len(arm.runs),
        "tokens": counts["tokens"],
        "loss_tokens": counts["loss_tokens"],
        "real_tokens": real["tokens"],
        "real_epochs": real["epochs"],
        "synthetic_tokens": synthetic["tokens"],
        "unique_tokens": available,
        "unique_tokens_read": min(real["tokens"], available),
        "parameters": counts["parameters"],
        "final_loss": counts["final_loss"],
        "training_flops": training_flops(training),
        "validation": _validation(counts, {run: run_directory / model_stage(arm, run) / METRICS for run in arm.runs}),
        "total_flops": math.fsum(manifests[stage].flops for stage in needed),
        "total_seconds": math.fsum(manifests[stage].seconds for stage in needed),
        **comparison["arms"][arm.name],
        "difference_to_baseline": comparison["differences"].get(arm.name, {}),
        "difference_to": comparison["pairwise"].get(arm.name, {}),
    }


def _validation(counts: dict[str, Any], metrics: dict[str, Path]) -> dict[str, Any]:
    """Return the held-out losses of an arm's first training run, in nats a token, and the curves of all of its runs.

    Nothing is returned where they were not measured.

    Args:
        counts: of the first training run.
        metrics: name of each training run -> its metrics.jsonl.
    """
    if "validation_loss" not in counts:
        return {}
    return {
        "selected_step": counts["selected_step"],
        "loss": counts["validation_loss"],
        "last_loss": counts["last_validation_loss"],
        "tokens": counts["validation_tokens"],
        "curves": {run: _curve(path) for run, path in metrics.items()},
    }


def _curve(metrics: Path) -> list[dict[str, Any]]:
    """Return the bits per byte of validation documents at each point of a training run where they were finite."""
    return [
        {"step": line["step"], "tokens": line["train/tokens"], "bits_per_byte": line[BITS_PER_BYTE]}
        for line in read_lines(metrics, BITS_PER_BYTE)
    ]
