"""Everything that the report shows, read from the manifests of a run alone: `results.json`."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbp_fast import __version__
from sbp_fast.config.files import load_config
from sbp_fast.errors import UserError
from sbp_fast.pipeline.files import read_json, write_json
from sbp_fast.pipeline.stage import MANIFEST, Manifest

RESULTS = "results.json"

STAGES = {
    "prepare": "corpus",
    "base": "base",
    "embed": "vectors",
    "pair": "pairs",
    "synthesizer": "synthesizer",
    "synthesize": "synthetic",
    "filter": "synthetic-kept",
    "quality": "quality",
    "joint": "joint",
    "oracle": "oracle",
    "evaluate": "evaluation",
}
"""Stage -> its directory in a run, in the order of the work."""

NEEDS = {
    "baseline": ("base",),
    "sbp": ("base", "embed", "pair", "synthesizer", "synthesize", "filter", "joint"),
    "oracle": ("oracle",),
}
"""What each arm takes beyond the prepared corpus; its last stage is its own training."""

PUBLISHED = {
    "source": "arXiv 2509.15248, version of ICLR 2026",
    "rates": {
        "repetition": {"200B": 0.043, "1T, 3B": 0.039, "1T, 6B": 0.026, "real": 0.018},
        "duplicates": {"200B": 0.008, "1T, 3B": 0.008, "1T, 6B": 0.003, "real": 0.007},
        "non_factual": {"200B": 0.151, "1T, 3B": 0.087, "1T, 6B": 0.065, "real": 0.018},
        "pair_irrelevance": {"200B": 0.256, "1T, 3B": 0.078, "1T, 6B": 0.060, "real": None},
        "pair_copying": {"200B": 0.001, "1T, 3B": 0.009, "1T, 6B": 0.003, "real": None},
    },
}
"""Quality of the paper's synthesized documents, for comparison: training tokens and size of the model -> rate."""


def write_results(run_directory: Path) -> dict[str, Any]:
    """Collect and write `results.json`; returns what it holds."""
    results = collect(run_directory)
    write_json(Path(run_directory) / RESULTS, results)
    return results


def collect(run_directory: str | Path) -> dict[str, Any]:
    """The numbers of a finished run.

    The same run gives the same dictionary, but for `seconds` and the versions of the software at work.

    Raises:
        UserError: a stage that is not finished, a directory that is no run.
    """
    run_directory = Path(run_directory)
    if not (run_directory / "config.toml").is_file():
        raise UserError(run_directory, "no run lies here", "give the directory that `sbp-fast run` wrote")
    config = load_config([run_directory / "config.toml"]).model_dump(mode="json")
    manifests = {stage: _manifest(run_directory / directory, stage) for stage, directory in STAGES.items()}
    counts = {stage: manifest.counts for stage, manifest in manifests.items()}
    evaluation = counts["evaluate"]
    return {
        "run": {
            "name": config["name"],
            "seed": config["seed"],
            "device": manifests["joint"].device,
            "versions": _versions(),
            "config": config,
        },
        "confidence": evaluation["confidence"],
        "corpus": counts["prepare"],
        "arms": {arm: _arm(arm, manifests) for arm in NEEDS},
        "oracle_ratio": counts["prepare"]["tokens"] / counts["prepare"]["unique_tokens"],
        "recovered_share_of_oracle": evaluation["recovered_share_of_oracle"],
        "pairs": counts["pair"] | {"embedding": counts["embed"]},
        "synthesizer": counts["synthesizer"],
        "synthesis": counts["synthesize"],
        "synthetic_quality": counts["filter"] | counts["quality"] | {"published": PUBLISHED},
        "ledger": _ledger(manifests),
        "totals": {
            "flops": sum(manifest.flops for manifest in manifests.values()),
            "seconds": sum(manifest.seconds for manifest in manifests.values()),
        },
        "matched": _matched(manifests),
    }


def _manifest(directory: Path, stage: str) -> Manifest:
    if not (directory / MANIFEST).is_file():
        raise UserError(directory, f"the stage {stage} is not finished", "rerun `sbp-fast run`: it goes on where it stopped")
    return Manifest(**read_json(directory / MANIFEST))


def _versions() -> dict[str, str]:
    return {
        "sbp_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _arm(arm: str, manifests: dict[str, Manifest]) -> dict[str, Any]:
    training, corpus, evaluation = manifests[NEEDS[arm][-1]], manifests["prepare"].counts, manifests["evaluate"].counts
    counts = training.counts
    real, synthetic = counts["sources"]["real"], counts["sources"].get("synthetic", {"tokens": 0})
    available = corpus["tokens"] if arm == "oracle" else corpus["unique_tokens"]
    return {
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
        "total_flops": sum(manifests[stage].flops for stage in NEEDS[arm]),
        "total_seconds": sum(manifests[stage].seconds for stage in NEEDS[arm]),
        **evaluation["arms"][arm],
        "difference_to_baseline": evaluation["differences"].get(arm, {}),
    }


def _ledger(manifests: dict[str, Manifest]) -> list[dict[str, Any]]:
    flops = sum(manifest.flops for manifest in manifests.values())
    seconds = sum(manifest.seconds for manifest in manifests.values())
    return [
        {
            "stage": stage,
            "arms": [arm for arm, needed in NEEDS.items() if stage in needed],
            "flops": manifest.flops,
            "seconds": manifest.seconds,
            "device": manifest.device,
            "share_of_flops": manifest.flops / flops if flops else 0.0,
            "share_of_seconds": manifest.seconds / seconds if seconds else 0.0,
        }
        for stage, manifest in manifests.items()
    ]


def _matched(manifests: dict[str, Manifest]) -> dict[str, Any]:
    """The two ways to compare at equal compute: the final training alone, and everything that SBP needed."""
    base, total = manifests["base"], sum(manifests[stage].flops for stage in NEEDS["sbp"])
    baseline_tokens = base.counts["tokens"] * total / base.flops
    return {
        "final_run": {
            "baseline_flops": base.flops,
            "sbp_flops": manifests["joint"].flops,
            "oracle_flops": manifests["oracle"].flops,
        },
        "end_to_end": {
            "baseline_flops": base.flops,
            "sbp_flops": total,
            "ratio": total / base.flops,
            "baseline_tokens": round(baseline_tokens),
            "baseline_epochs": baseline_tokens / manifests["prepare"].counts["unique_tokens"],
        },
    }
