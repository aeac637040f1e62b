"""The file `results.json`: every number of a run, read from the manifests of its stages."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbp_fast import __version__
from sbp_fast.config import RunConfig
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.experiment.arms import Arm, arms_of
from sbp_fast.experiment.graph import (
    COMPARE,
    EMBED,
    FILTER,
    PAIR,
    PREPARE,
    QUALITY,
    RELATION,
    SYNTHESIZE,
    SYNTHESIZER,
    stages_of,
    train_stage,
)
from sbp_fast.experiment.ledger import ledger, matched_compute, stages_of_arm, totals
from sbp_fast.pipeline.files import read_json, write_json
from sbp_fast.pipeline.manifest import MANIFEST, Manifest

RESULTS = "results.json"


def write_results(run_directory: Path) -> dict[str, Any]:
    """Write `results.json` of a finished run and return its content."""
    results = collect(run_directory)
    write_json(Path(run_directory) / RESULTS, results)
    return results


def collect(run_directory: str | Path) -> dict[str, Any]:
    """Return the numbers of a finished run.

    The same run gives the same dictionary, except for `seconds` and the versions of the software.

    Raises:
        UserError: a stage is not finished, or the directory is no run.
    """
    run_directory = Path(run_directory)
    if not (run_directory / "config.toml").is_file():
        raise UserError(run_directory, "is no run", "give the directory that `sbp-fast run` wrote")
    config = load_config([run_directory / "config.toml"])
    manifests = {name: _manifest(run_directory / name, name) for name in stages_of(config)}
    counts = {name: manifest.counts for name, manifest in manifests.items()}
    comparison = counts[COMPARE]
    results = {
        "run": {
            "name": config.name,
            "seed": config.seed,
            "device": manifests[train_stage(config.baseline)].device,
            "versions": _versions(),
            "config": config.model_dump(mode="json"),
        },
        "baseline": config.baseline,
        "confidence": comparison["confidence"],
        "corpus": counts[PREPARE],
        "metrics": comparison["metrics"],
        "arms": {name: _arm(config, arm, manifests) for name, arm in arms_of(config).items()},
        "oracle_ratio": counts[PREPARE]["tokens"] / counts[PREPARE]["unique_tokens"],
        "recovered_share_of_oracle": comparison["recovered_share_of_oracle"],
        "ledger": ledger(config, manifests),
        "totals": totals(manifests),
        "matched": matched_compute(config, manifests),
    }
    if FILTER in manifests:
        results |= {
            "pairs": counts[PAIR] | {"embedding": counts[EMBED]},
            "synthesizer": counts[SYNTHESIZER],
            "synthesis": counts[SYNTHESIZE],
            "synthetic_quality": counts[FILTER] | counts[QUALITY],
            "relation": counts[RELATION],
        }
    return results


def _manifest(directory: Path, stage: str) -> Manifest:
    if not (directory / MANIFEST).is_file():
        raise UserError(directory, f"the stage {stage} is not finished", "rerun `sbp-fast run`: it resumes where it stopped")
    return Manifest(**read_json(directory / MANIFEST))


def _versions() -> dict[str, str]:
    return {
        "sbp_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _arm(config: RunConfig, arm: Arm, manifests: dict[str, Manifest]) -> dict[str, Any]:
    """Return the tokens, compute and scores of an arm; counts are those of its first training run."""
    training, corpus, comparison = manifests[train_stage(arm.name)], manifests[PREPARE].counts, manifests[COMPARE].counts
    counts, needed = training.counts, stages_of_arm(stages_of(config), arm)
    real, synthetic = counts["sources"]["real"], counts["sources"].get("synthetic", {"tokens": 0})
    available = corpus["tokens"] if arm.settings.data == "all" else corpus["unique_tokens"]
    return {
        "label": arm.label,
        "data": arm.settings.data,
        "synthetic": arm.settings.synthetic,
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
        "training_flops": training.flops,
        "total_flops": sum(manifests[stage].flops for stage in needed),
        "total_seconds": sum(manifests[stage].seconds for stage in needed),
        **comparison["arms"][arm.name],
        "difference_to_baseline": comparison["differences"].get(arm.name, {}),
    }
