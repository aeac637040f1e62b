"""What a killed run resumes from: one file with the weights, the optimizer, the step and the running totals."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sbp_fast.files import atomic_open, atomic_path

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"


@dataclass
class Totals:
    """Sums over the steps so far."""

    steps: int = 0
    tokens: int = 0
    real_tokens: int = 0
    synthetic_tokens: int = 0
    loss_tokens: int = 0
    visible_pairs: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loop_seconds: float = 0.0


def save_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, totals: Totals, metrics: list[dict[str, Any]]
) -> None:
    """Write metrics, then the checkpoint: killed between the two, the resumed run cuts the metrics back to its step."""
    write_metrics(directory, metrics)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "totals": asdict(totals)}
    with atomic_path(directory / CHECKPOINT) as temporary:
        torch.save(state, temporary)


def load_checkpoint(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Totals, list[dict[str, Any]]]:
    """Put weights and optimizer where the checkpoint was; without one, leave them and begin at step 0."""
    if not (directory / CHECKPOINT).is_file():
        return Totals(), []
    state = torch.load(directory / CHECKPOINT, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    totals = Totals(**state["totals"])
    lines = (directory / METRICS).read_text(encoding="utf-8").splitlines()
    return totals, [json.loads(line) for line in lines[: totals.steps]]


def write_metrics(directory: Path, metrics: list[dict[str, Any]]) -> None:
    with atomic_open(directory / METRICS) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in metrics)
