"""The steps of `linear_cross_entropy` in plain torch: the CPU's path, for any device and dtype.

They have the signatures of the launchers in `launch`; T, H, V, C, B and the tensors are described in
`operations`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 512, 4096  # of the logits that `statistics` and `gradients` hold at a time


def multiplied(rows: Tensor, count: Tensor) -> int:
    """How many of the rows go into products: those with loss where the host can tell, else all."""
    return int(count) if count.device.type == "cpu" else len(rows)


def gather(source: Tensor, rows: Tensor) -> Tensor:
    """[B, H] of source [T, H]; zeros where a row is T."""
    tokens = len(source)
    return source.index_select(0, rows.clamp(max=tokens - 1)).masked_fill_((rows >= tokens).unsqueeze(1), 0)


def scatter(out: Tensor, rows: Tensor, part: Tensor, scale: Tensor | None) -> None:
    """Set out [T, H], zeros before, at rows [B] to scale * part [B, H]; nothing where a row is T."""
    if scale is not None:
        part = part * scale
    part = part.to(out.dtype).masked_fill((rows >= len(out)).unsqueeze(1), 0)
    out.index_add_(0, rows.clamp(max=len(out) - 1), part)


def slab(
    statistics: Tensor, logits: Tensor, targets: Tensor, coefficients: Tensor | None, known: bool,
    z_loss: float, softcap: float, with_sum: bool,
) -> None:  # fmt: skip
    """Statistics [4, B] of logits [B, V], unless known, and with coefficients [3, B] the gradient in place of the logits.

    The coefficients are gradients of a loss by the statistics but the first, where these are known; else the first of them is
    its gradient by the log-sum-exp, to which that of z_loss is added.
    """
    capped = _cap(logits.to(statistics.dtype), softcap)
    slope = _slope(capped, softcap) if coefficients is not None else None
    largest, total = statistics[:2]
    if not known:
        largest.copy_(capped.amax(1))
        statistics[2] = _relative(_target_logit(capped, targets), targets, largest, logits.shape[1])
        statistics[3] = capped.sum(1) if with_sum else 0
    exponentials = _exponentials(capped, largest)
    if not known:
        torch.sum(exponentials, 1, out=total)
    if coefficients is not None:
        a, b, c = coefficients
        a = a if known else a * (1 + 2 * z_loss * (largest + total.log())) / total
        logits.copy_(_gradient(exponentials, targets, a, b, c if with_sum else None, slope))


def statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor, softcap: float, with_sum: bool
) -> Tensor:
    """Statistics [4, C], a tile of the logits at a time."""
    out = no_logits(len(rows), torch.promote_types(hidden.dtype, torch.float32), hidden.device)
    for part in _slices(multiplied(rows, count), TILE_ROWS):
        x = gather(hidden, rows[part]).to(out.dtype)
        largest, total, target_logit, logit_sum = out[:, part].zero_()
        largest.fill_(float("-inf"))
        for columns in _slices(len(weight), TILE_COLUMNS):
            logits = _cap(torch.mm(x, weight[columns].to(out.dtype).T), softcap)
            target_logit += _target_logit(logits, targets[part] - columns.start)
            logit_sum += logits.sum(1) if with_sum else 0
            now = torch.maximum(largest, logits.amax(1))
            total.mul_((largest - now).exp_()).add_(_exponentials(logits, now).sum(1))
            largest.copy_(now)
        target_logit.copy_(_relative(target_logit, targets[part], largest, len(weight)))
    return out


def no_logits(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Statistics [4, rows] where there is nothing to sum."""
    statistics = torch.zeros(4, rows, dtype=dtype, device=device)
    statistics[1] = 1
    return statistics


def gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor, largest: Tensor, coefficients: Tensor,
    scale: Tensor, softcap: float, with_sum: bool, hidden_gradient: Tensor | None, weight_gradient: Tensor | None,
) -> None:  # fmt: skip
    """Fills hidden_gradient [T, H], zeros before, at the rows, and weight_gradient [V, H]."""
    dtype, live = largest.dtype, multiplied(rows, count)
    total = torch.zeros(live, hidden.shape[1], dtype=dtype, device=hidden.device) if hidden_gradient is not None else None
    for columns in _slices(len(weight), TILE_COLUMNS):
        w = weight[columns].to(dtype)
        column_gradient = torch.zeros_like(w)
        for part in _slices(live, TILE_ROWS):
            x = gather(hidden, rows[part]).to(dtype)
            logits = _cap(torch.mm(x, w.T), softcap)
            a, b, c = coefficients[:, part]
            slope, exponentials = _slope(logits, softcap), _exponentials(logits, largest[part])
            gradient = _gradient(exponentials, targets[part] - columns.start, a, b, c if with_sum else None, slope)
            if total is not None:
                total[part].addmm_(gradient, w)
            if weight_gradient is not None:
                column_gradient.addmm_(gradient.T, x)
        if weight_gradient is not None:
            weight_gradient[columns] = column_gradient * scale
    if hidden_gradient is not None and total is not None:
        scatter(hidden_gradient, rows[:live], total, scale)


def _cap(logits: Tensor, softcap: float) -> Tensor:
    return logits.div(softcap).tanh_().mul_(softcap) if softcap else logits


def _target_logit(logits: Tensor, targets: Tensor) -> Tensor:
    """[B]; 0 where the target is not among the columns of logits [B, columns]."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    return logits.gather(1, targets.long().where(inside, 0).unsqueeze(1)).squeeze(1).where(inside, 0)


def _relative(target_logit: Tensor, targets: Tensor, largest: Tensor, vocabulary: int) -> Tensor:
    """Target's logit less the largest: 0 where the target is none of this vocabulary's, NaN where it does not exist."""
    relative = (target_logit - largest).where(targets >= 0, 0)
    return relative.masked_fill_(targets >= vocabulary, float("nan"))


def _slope(capped: Tensor, softcap: float) -> Tensor | None:
    """Derivative of the soft cap, None where there is none."""
    return 1 - (capped / softcap).square_() if softcap else None


def _exponentials(logits: Tensor, largest: Tensor) -> Tensor:
    """exp(logits - largest), in place of the logits."""
    return logits.sub_(largest.unsqueeze(1)).exp_()


def _gradient(exponentials: Tensor, targets: Tensor, a: Tensor, b: Tensor, c: Tensor | None, slope: Tensor | None) -> Tensor:
    """Compute a * exponentials + b at the target + c, times the slope, in place of the exponentials."""
    gradient = exponentials.mul_(a.unsqueeze(1))
    if c is not None:
        gradient += c.unsqueeze(1)
    inside = (targets >= 0) & (targets < gradient.shape[1])
    gradient.scatter_add_(1, targets.long().where(inside, 0).unsqueeze(1), b.where(inside, 0).unsqueeze(1))
    return gradient if slope is None else gradient.mul_(slope)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
