"""The one training loop: base, synthesizer and joint runs differ in their batches alone."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from sbp_fast.config import TrainConfig
from sbp_fast.errors import UserError
from sbp_fast.model.transformer import Transformer
from sbp_fast.progress import Task
from sbp_fast.stage import Work
from sbp_fast.train.batches import Batches, PackedBatch
from sbp_fast.train.checkpoint import Totals, load_checkpoint, save_checkpoint, write_metrics
from sbp_fast.train.optimizer import learning_rate, make_optimizer

SKIPPED_IN_A_ROW = 5  # one bad batch is bad luck, this many a diverged run


def fit(
    model: Transformer, batches: Batches, recipe: TrainConfig, work: Work, real_epoch: int
) -> tuple[Totals, list[dict[str, Any]]]:
    """Train `model` on all steps of `batches`, from the checkpoint in the stage's directory where there is one.

    A step whose loss or gradient is not finite changes nothing but its line in the metrics, where both are null.

    Args:
        real_epoch: tokens of one reading of the real corpus, for the metrics.

    Returns:
        Sums over the steps, and a dictionary of metrics for each.

    Raises:
        UserError: naming the step, when SKIPPED_IN_A_ROW steps in a row were not finite.
    """
    optimizer = make_optimizer(model, recipe)
    totals, metrics = load_checkpoint(work.directory, model, optimizer)
    model.train()
    saved = time.monotonic()
    with work.console.task("train", batches.tokens, "tokens", done=totals.tokens) as task:
        for step in range(totals.steps, batches.steps):
            started = time.monotonic()
            batch = batches.batch(step).to(model.device)
            rate = learning_rate(recipe, step, batches.steps)
            loss, norm = train_step(model, batch, optimizer, rate, recipe)
            seconds = time.monotonic() - started
            _count(totals, batch, seconds, finite=loss is not None)
            metrics.append(
                {
                    "step": step,
                    "train/tokens": totals.tokens,
                    "train/loss": loss,
                    "train/grad_norm": norm,
                    "train/lr": rate,
                    "train/real_epochs": totals.real_tokens / real_epoch,
                    "perf/tokens_per_second": len(batch.tokens) / seconds,
                }
            )
            _report(task, step, batch, loss, totals)
            if time.monotonic() - saved >= recipe.checkpoint_seconds and step + 1 < batches.steps:
                save_checkpoint(work.directory, model, optimizer, totals, metrics)
                work.keep_clock()
                saved = time.monotonic()
    write_metrics(work.directory, metrics)
    return totals, metrics


def train_step(
    model: Transformer, batch: PackedBatch, optimizer: torch.optim.Optimizer, rate: float, recipe: TrainConfig
) -> tuple[float, float] | tuple[None, None]:
    """One step on the mean loss of the batch's loss tokens: its loss in nats and gradient norm before clipping.

    None where either is not finite; the weights and the optimizer are then as they were.
    """
    loss = mean_loss(model, batch, recipe.attention)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip, foreach=True)
    finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return (loss.item(), norm.item()) if finite else (None, None)


def mean_loss(model: Transformer, batch: PackedBatch, attention: str) -> Tensor:
    """Mean cross-entropy over the batch's loss tokens; on CUDA the layers run in bfloat16, the weights stay float32."""
    cuda = model.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
        return model.loss(batch.tokens, batch.targets, batch.layout, attention) / batch.loss_tokens


def _count(totals: Totals, batch: PackedBatch, seconds: float, finite: bool) -> None:
    totals.steps += 1
    totals.tokens += len(batch.tokens)
    totals.real_tokens += batch.real_tokens
    totals.synthetic_tokens += batch.synthetic_tokens
    totals.loss_tokens += batch.loss_tokens
    totals.visible_pairs += batch.layout.visible_pairs()
    totals.loop_seconds += seconds
    totals.skipped_steps += not finite
    totals.skipped_in_a_row = 0 if finite else totals.skipped_in_a_row + 1


def _report(task: Task, step: int, batch: PackedBatch, loss: float | None, totals: Totals) -> None:
    task.advance(len(batch.tokens), "not finite: step skipped" if loss is None else f"loss {loss:.2f}")
    if totals.skipped_in_a_row >= SKIPPED_IN_A_ROW:
        raise UserError(
            f"training, step {step}",
            f"loss or gradient not finite {SKIPPED_IN_A_ROW} steps in a row",
            "lower learning_rate or gradient_clip of the recipe, or lengthen its warmup_share",
        )
