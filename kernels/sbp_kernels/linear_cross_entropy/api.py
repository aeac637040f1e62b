"""Output projection and cross-entropy in one, over the rows that carry loss, so that all logits never exist together.

`slab` computes the logits of one bounded chunk of rows after the other and, while they exist, the exact gradients: 6 R H V
operations for R rows with the backward pass, one slab of logits, and the gradient by the weight in float32. `recompute` keeps
no logits: the forward pass reduces each tile of them at once; the backward pass computes them again, and holds their gradient
for one bounded panel of the vocabulary: 8 R H V operations, 128 MiB for the panel and R x H numbers in float32. Neither skips
small gradients. Both have the same result on every run.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sbp_kernels.linear_cross_entropy import operations

MODES = ("auto", "slab", "recompute")
BACKENDS = ("auto", "torch", "triton")
REDUCTIONS = ("sum", "mean", "none")
SLAB_MODE_BYTES = 9 * 2**29  # of a slab and the weight's gradient in float32, from which on "auto" takes `recompute`


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_rows: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "sum",
    normalizer: Tensor | float | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    mode: str = "auto",
    backend: str = "auto",
    slab_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy of targets under softmax(hidden @ weight.T), summed over the rows that carry loss.

    A row with logits z, log-sum-exp L and target t contributes
    `row_weight * ((1 - s) * (L - z[t]) + s * (L - mean(z)) + z_loss * L^2)`, s being the label smoothing. All of it is computed
    in float32 (float64 for float64) from logits which `slab` rounds to the dtype of hidden, and `recompute` does not. The
    gradient by the weight is summed in float32.

    Rows without loss are left out of every product, which saves their cost as far as the host knows them: on the CPU always;
    on other devices by `loss_rows` of a tight capacity. Without it CUDA finds the rows on the device, with no synchronisation:
    the kernels of `recompute` stop at their number, the library's products in `slab` run over all T rows, the absent ones
    being zeros. Inputs in rows without loss are never used: NaN there touches nothing.

    Args:
        hidden: [T, H], float16, bfloat16, float32 or float64.
        weight: [V, H], the output projection, like hidden. With a group, this rank's [V / n, H].
        targets: int64 [T]; rows equal to `ignore_index` carry no loss.
        loss_rows: int32 or int64 [capacity], distinct indices of the rows that may carry loss, filled up with T (any index
            outside 0..T-1 counts as none): see `loss_rows_of`. None stands for all rows.
        ignore_index: target of the rows without loss.
        row_weight: [T], factor of each row's loss; takes no gradient.
        reduction: "sum"; "mean", the sum over the sum of the row weights (over the number of rows with loss without them), 0
            where there is none; "none", the losses in float32, [T], 0 in rows without. Its backward pass computes the logits
            again, since each row's upstream gradient may differ.
        normalizer: divides the result, such as the number of loss tokens of a global batch; a scalar tensor may stay on the
            device. Not with "mean".
        z_loss: weight of the squared log-sum-exp.
        softcap: logits become softcap * tanh(logits / softcap).
        label_smoothing: in 0..1.
        mode: "slab", "recompute", or "auto", which `resolve_mode` resolves.
        backend: "torch", "triton", or "auto": Triton for CUDA tensors, plain torch for others. Plain torch on CUDA multiplies
            `recompute` in float32 and is for checking.
        slab_rows: rows whose logits exist at a time in `slab`; None takes 256 MiB of them, but at least 4,096 where these
            take no more than 1 GiB, and always 2,048 (on the CPU 8 MiB, at least 256).
        group: the vocabulary is sharded over these ranks, equally, in rank order. All ranks call with the same hidden and
            targets and get the same loss; the gradient by hidden is summed over them. The backward pass computes the logits
            again in either mode. Not under torch.compile.

    Returns:
        float32 (float64 for float64 input), differentiable in hidden and weight, once.

    Raises:
        ValueError: arguments that do not fit together; targets outside 0..V-1, on the CPU (elsewhere these make the loss NaN).
    """
    _check(hidden, weight, targets, loss_rows, row_weight)
    _check_options(reduction, normalizer, softcap, label_smoothing, slab_rows)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    elif hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: convert one of them, or use autocast")
    device_type = hidden.device.type
    mode = resolve_mode(len(weight), weight.shape[1], weight.dtype, mode=mode, device_type=device_type)
    backend = _resolve_backend(backend, mode, hidden)
    slab_rows = slab_rows or operations.default_slab_rows(len(weight), weight.dtype, device_type)

    shards, shard = (1, 0) if group is None else (group.size(), group.rank())
    rows, count, row_targets = _rows_with_loss(targets, loss_rows, ignore_index)
    weights = _weights_of_rows(rows, row_weight, targets, torch.promote_types(hidden.dtype, torch.float32))
    row_targets = _targets_of_shard(row_targets, rows < len(targets), len(weight), shard, shards)
    if group is not None:
        hidden = _SumOfGradients.apply(hidden, group)
    inputs = (hidden, weight, row_targets, rows, count)
    if mode == "slab" and reduction != "none" and group is None:
        wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
        loss = operations.OPERATIONS.linear_cross_entropy_total(
            *inputs, weights, z_loss, label_smoothing, softcap or 0.0, backend, slab_rows, *wanted
        )[0]
    else:
        statistics = operations.OPERATIONS.linear_cross_entropy_statistics(
            *inputs, softcap or 0.0, label_smoothing > 0, backend, mode, slab_rows
        )
        statistics = statistics if group is None else _over_shards(statistics, row_targets, group)
        losses = operations.losses_of(statistics, len(weight) * shards, z_loss, label_smoothing)
        losses = losses.mul(weights).where(rows < len(targets), 0)
        loss = _by_token(losses, rows, len(targets)) if reduction == "none" else losses.sum()
    if reduction == "mean":
        normalizer = weights.sum()
        normalizer = normalizer.where(normalizer != 0, 1)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.reshape(())
    return loss if normalizer is None else loss / normalizer


def resolve_mode(vocabulary: int, width: int, dtype: torch.dtype, *, mode: str = "auto", device_type: str = "cuda") -> str:
    """The mode that `linear_cross_entropy` uses: "slab" or "recompute".

    "auto" takes "slab", which has fewer operations, as long as a slab and the weight's gradient in float32 stay below 4.5
    GiB together, and where rows of `width` numbers are no multiple of 16 bytes, which the kernels of `recompute` need.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    if mode != "auto":
        return mode
    slab = operations.default_slab_rows(vocabulary, dtype, device_type) * vocabulary * dtype.itemsize
    fits = slab + 4 * vocabulary * width < SLAB_MODE_BYTES
    return "slab" if fits or width * dtype.itemsize % 16 else "recompute"


def loss_rows_of(targets: Tensor, capacity: int, ignore_index: int = -100) -> Tensor:
    """`loss_rows` for `linear_cross_entropy`, of a fixed length, made on the host where a batch is put together.

    Args:
        targets: [T], on the CPU.
        capacity: at least the number of targets that differ from `ignore_index`; the same for every batch, so that shapes
            never change. Products run over `capacity` rows: choose it tight.
        ignore_index: target of the rows without loss.

    Returns:
        int32 [capacity] on the CPU: the indices of the rows with loss, in order, then T.

    Raises:
        ValueError: targets on another device; more rows with loss than capacity.
    """
    if targets.device.type != "cpu":
        raise ValueError(f"targets must be on the CPU, not {targets.device}: find the rows before the batch is copied")
    rows = (targets != ignore_index).nonzero().squeeze(1)
    if len(rows) > capacity:
        raise ValueError(f"{len(rows)} rows carry loss, more than the capacity of {capacity}: raise it")
    return F.pad(rows, (0, capacity - len(rows)), value=len(targets)).int()


def select_loss_rows(hidden: Tensor, targets: Tensor, loss_rows: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Hidden states [capacity, H] and targets [capacity] of only the rows with loss, such as for the final norm.

    Entries that only fill up `loss_rows` repeat its first row and have no loss. What follows is
    `linear_cross_entropy(norm(hidden), weight, targets)`, without `loss_rows`.
    """
    inside = (loss_rows >= 0) & (loss_rows < len(targets))
    rows = loss_rows.where(inside, loss_rows[:1].clamp(0, len(targets) - 1))
    return hidden.index_select(0, rows), targets.index_select(0, rows).where(inside, ignore_index)


class LinearCrossEntropy(nn.Module):
    """The output projection's weight with the loss that it serves, so that hooks on the module, FSDP's among them, see both.

    Args:
        width, vocabulary: H and V.
        weight: [V, H], a parameter to share, such as the input embedding's; a new one by default, as in `nn.Linear`.
        options: of `linear_cross_entropy`, for every call.
    """

    def __init__(
        self,
        width: int,
        vocabulary: int,
        *,
        weight: nn.Parameter | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (vocabulary, width):
            raise ValueError(f"weight is {tuple(weight.shape)}, not [vocabulary, width] = {(vocabulary, width)}")
        self.options = options
        if weight is None:
            self.weight = nn.Parameter(torch.empty(vocabulary, width, device=device, dtype=dtype))
            self.reset_parameters()
        else:
            self.weight = weight

    def reset_parameters(self) -> None:
        """Initialise the weight as `nn.Linear` does."""
        nn.init.uniform_(self.weight, -(self.weight.shape[1] ** -0.5), self.weight.shape[1] ** -0.5)

    def forward(self, hidden: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """Compute the loss of hidden [T, H] and targets [T]; options given here come before the module's."""
        return linear_cross_entropy(hidden, self.weight, targets, **{**self.options, **options})


def _rows_with_loss(targets: Tensor, loss_rows: Tensor | None, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """int32 [C] rows with loss, in order, then T; their number, int32; their targets [C].

    Shapes depend only on shapes; there is no host-device synchronisation.
    """
    tokens = len(targets)
    padded = F.pad(targets, (0, 1), value=ignore_index)
    if loss_rows is None:
        candidates = torch.arange(tokens, device=targets.device)
    else:
        candidates = loss_rows.long().where((loss_rows >= 0) & (loss_rows < tokens), tokens)
    valid = padded.index_select(0, candidates) != ignore_index
    index = (valid.cumsum(0) - 1).where(valid, len(candidates))  # one element more, which is cut off, takes all others
    rows = candidates.new_full((len(candidates) + 1,), tokens).scatter(0, index, candidates)[:-1]
    return rows.int(), valid.sum().int(), padded.index_select(0, rows)


def _weights_of_rows(rows: Tensor, row_weight: Tensor | None, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """[C]; zeros where a row is no row."""
    if row_weight is None:
        return (rows < len(targets)).to(dtype)
    return F.pad(row_weight.detach().to(dtype), (0, 1)).index_select(0, rows)


def _targets_of_shard(targets: Tensor, live: Tensor, vocabulary: int, shard: int, shards: int) -> Tensor:
    """int32 [C]: -1 where another shard or no row has the target, `vocabulary` where none has it."""
    here = targets - shard * vocabulary
    inside, exists = (here >= 0) & (here < vocabulary), (targets >= 0) & (targets < vocabulary * shards)
    return here.where(inside, -1).where(exists, vocabulary).where(live, -1).int()


def _by_token(losses: Tensor, rows: Tensor, tokens: int) -> Tensor:
    """[C] -> [T]; zeros elsewhere."""
    return losses.new_zeros(tokens + 1).scatter(0, rows.long(), losses)[:-1]


def _over_shards(statistics: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Statistics [4, C] of the whole vocabulary from those of this rank's shard; see `operations`.

    Their gradients by this rank's need no communication, since every rank has the same loss: exp(M_shard - M) for the sum of
    exponentials, 1 for the target's logit and for the sum of logits.
    """
    mine = statistics.detach()
    largest = mine[0].clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    share = (mine[0] - largest).exp()
    target_logit = (mine[2] + (mine[0] - largest)).where(targets >= 0, 0)
    sums = torch.stack([mine[1] * share, target_logit, mine[3]])
    dist.all_reduce(sums, group=group)
    slope = torch.stack([torch.zeros_like(share), share, torch.ones_like(share), torch.ones_like(share)])
    return torch.cat([largest.unsqueeze(0), sums]) + slope * (statistics - mine)


class _SumOfGradients(torch.autograd.Function):
    """The identity; its gradient is summed over the ranks, each of which has the part from its shard of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _resolve_backend(backend: str, mode: str, hidden: Tensor) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if hidden.device.type == "cuda" else "torch"
    if backend == "torch":
        return backend
    if hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend 'triton' needs CUDA tensors, not {hidden.device}: use 'torch' (TRITON_INTERPRET=1 tests it)")
    if hidden.dtype == torch.float64:
        raise ValueError("backend 'triton' has no float64: use backend 'torch'")
    if mode == "recompute" and hidden.shape[1] * hidden.element_size() % 16:
        raise ValueError(f"mode 'recompute' needs rows of a multiple of 16 bytes, not H = {hidden.shape[1]}: use 'slab'")
    return backend


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, loss_rows: Tensor | None, row_weight: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        given = f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"hidden [T, H], weight [V, H], targets [T] do not fit: {given}")
    if not hidden.is_floating_point() or targets.dtype != torch.int64:
        raise ValueError(f"hidden must be floating-point and targets int64, not {hidden.dtype} and {targets.dtype}")
    if loss_rows is not None and (loss_rows.dim() != 1 or loss_rows.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"loss_rows must be int32 [capacity], not {loss_rows.dtype} {tuple(loss_rows.shape)}")
    if row_weight is not None and row_weight.shape != targets.shape:
        raise ValueError(f"row_weight must be [T] = {tuple(targets.shape)}, not {tuple(row_weight.shape)}")
    devices = {str(x.device) for x in (hidden, weight, targets, loss_rows, row_weight) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, not on {' and '.join(sorted(devices))}")


def _check_options(
    reduction: str, normalizer: Tensor | float | None, softcap: float | None, label_smoothing: float, slab_rows: int | None
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown: use one of {', '.join(REDUCTIONS)}")
    if normalizer is not None and reduction == "mean":
        raise ValueError("normalizer goes with reduction 'sum' or 'none': 'mean' has its own")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        raise ValueError(f"normalizer must be a scalar, not {tuple(normalizer.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None for none, not {softcap}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0..1, not {label_smoothing}")
    if slab_rows is not None and slab_rows < 1:
        raise ValueError(f"slab_rows must be at least 1, not {slab_rows}")
