"""The compute ledger: FLOPs and seconds of every stage, the arms that needed it, and comparisons at equal compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sbp_fast.config import RunConfig
from sbp_fast.experiment.arms import Arm, arms_of
from sbp_fast.experiment.graph import PREPARE, Stage, model_stage, needed_stages, stages_of
from sbp_fast.pipeline.manifest import Manifest

Manifests = Mapping[str, Manifest]


def stages_of_arm(stages: Mapping[str, Stage], arm: Arm) -> set[str]:
    """Return the stages that the first training run of an arm needs, except `prepare`, which every arm shares."""
    return needed_stages(stages, model_stage(arm, arm.name)) - {PREPARE}


def ledger(config: RunConfig, manifests: Manifests) -> list[dict[str, Any]]:
    """Return a line for each stage: FLOPs and seconds with their shares, the device, and the arms that needed it."""
    stages, arms = stages_of(config), arms_of(config)
    needed = {arm.name: stages_of_arm(stages, arm) for arm in arms.values()}
    flops, seconds = totals(manifests).values()
    return [
        {
            "stage": name,
            "arms": [arm for arm in arms if name in needed[arm] or stages[name].arm == arm],
            "for_all_arms": name == PREPARE,
            "flops": manifest.flops,
            "seconds": manifest.seconds,
            "device": manifest.device,
            "share_of_flops": manifest.flops / flops if flops else 0.0,
            "share_of_seconds": manifest.seconds / seconds if seconds else 0.0,
        }
        for name, manifest in manifests.items()
    ]


def totals(manifests: Manifests) -> dict[str, float]:
    """Return the FLOPs and seconds of all stages."""
    return {key: sum(getattr(manifest, key) for manifest in manifests.values()) for key in ("flops", "seconds")}


def matched_compute(config: RunConfig, manifests: Manifests) -> dict[str, Any]:
    """Return two comparisons at equal compute: of the final training runs alone, and of all stages that an arm needed.

    "end_to_end" has an entry for each arm but the baseline: the FLOPs of all stages that it needed, recipes that were tried
    included, their ratio to those of a baseline training run, and the tokens and epochs that the baseline could have trained on
    with as many FLOPs.
    """
    stages, arms = stages_of(config), arms_of(config)
    base = manifests[model_stage(arms[config.baseline], config.baseline)]
    base_flops = training_flops(base)
    end_to_end = {}
    for arm in arms.values():
        if arm.name != config.baseline:
            flops = math.fsum(manifests[name].flops for name in stages_of_arm(stages, arm))
            tokens = base.counts["tokens"] * flops / base_flops
            epochs = tokens / manifests[PREPARE].counts["unique_tokens"]
            end_to_end[arm.name] = {
                "flops": flops,
                "ratio": flops / base_flops,
                "baseline_tokens": round(tokens),
                "baseline_epochs": epochs,
            }
    final = {arm.name: training_flops(manifests[model_stage(arm, arm.name)]) for arm in arms.values()}
    return {"final_run": final, "end_to_end": end_to_end, "baseline_flops": base_flops}


def training_flops(manifest: Manifest) -> float:
    """Return the FLOPs of the training run whose model a stage holds: its own, or those of the run that `choose` chose."""
    return float(manifest.counts["choice"]["training_flops"]) if "choice" in manifest.counts else manifest.flops
