"""The PyTorch operations of `linear_cross_entropy`, which go through the logits chunk by chunk, and their gradients.

Sizes: T tokens, H width, V vocabulary, C rows that may carry loss, B rows of a slab. What all operations share:
    hidden [T, H], weight [V, H].
    targets: int32 [C]; V for one that does not exist, which is refused on the CPU and makes the loss NaN elsewhere; -1 for one
        that another shard of the vocabulary holds.
    rows: int32 [C], indices into hidden of the rows with loss, then T up to the end.
    count: int32 scalar, how many are not T; the host reads it only on the CPU.
    softcap: logits become softcap * tanh(logits / softcap); 0 leaves them as they are.
    backend: "torch" or "triton".

The statistics of a row, [4, C], are its largest logit M, the sum of exp(logit - M), the target's logit less M and, where
with_sum, the sum of the logits, in float32, or in float64 for float64. A loss is made of these, without the rounding of a large
log-sum-exp, and so is its gradient: coefficients, [3, C], are the gradients of the loss by each but M, on which it does not
depend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from sbp_kernels._operands import dense
from sbp_kernels._registration import register_operation
from sbp_kernels.linear_cross_entropy import cpu as plain


def total_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor, row_weight: Tensor,
    z_loss: float, label_smoothing: float, softcap: float, backend: str, slab_rows: int, for_hidden: bool, for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of the losses times row_weight [C], and its gradients, computed while the logits of a slab exist.

    Returns:
        the sum; a scale, [1]; the gradients over this scale by hidden [T, H], in that dtype, and by weight [V, H], in the dtype
        of the sum, so that a factor from upstream comes before the rounding. A gradient that is not wanted is empty.
    """
    _check_targets(targets, len(weight))
    by_target, by_sum = label_smoothing - 1, -label_smoothing / len(weight)
    coefficients, scale = _within_one(torch.stack([row_weight, by_target * row_weight, by_sum * row_weight]))
    statistics, hidden_gradient, weight_gradient = _in_slabs(
        hidden, weight, targets, rows, count, softcap, label_smoothing > 0, backend, slab_rows,
        coefficients=coefficients, z_loss=z_loss, for_hidden=for_hidden, for_weight=for_weight,
    )  # fmt: skip
    losses = losses_of(statistics, len(weight), z_loss, label_smoothing)
    return losses.mul(row_weight).where(rows < len(hidden), 0).sum(), scale, hidden_gradient, weight_gradient


def losses_of(statistics: Tensor, vocabulary: int, z_loss: float, label_smoothing: float) -> Tensor:
    """[C]: cross-entropy against the target mixed with the uniform distribution (Szegedy et al. 2016, section 7).

    Plus z_loss * log-sum-exp^2, which keeps the softmax's normaliser near 1 (Chowdhery et al. 2022, "PaLM", section 5).
    """
    largest, total, target_logit, logit_sum = statistics.unbind()
    log_total = total.log()
    losses = (1 - label_smoothing) * (log_total - target_logit)
    if label_smoothing or z_loss:
        log_sum_exp = largest.detach() + log_total
        losses = losses + label_smoothing * (log_sum_exp - logit_sum / vocabulary) + z_loss * log_sum_exp.square()
    return losses


def logit_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor,
    softcap: float, with_sum: bool, backend: str, mode: str, slab_rows: int,
) -> Tensor:  # fmt: skip
    """[4, C]; beyond `count` those of some finite logits."""
    _check_targets(targets, len(weight))
    if mode == "slab":
        return _in_slabs(hidden, weight, targets, rows, count, softcap, with_sum, backend, slab_rows)[0]
    return _steps(backend, rows).statistics(hidden, weight, targets, rows, count, softcap, with_sum)


def logit_statistics_backward(
    coefficients: Tensor, statistics: Tensor,
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor,
    softcap: float, with_sum: bool, backend: str, mode: str, slab_rows: int, for_hidden: bool, for_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients by hidden and weight, in their dtypes, the logits being computed once more; empty where not wanted."""
    coefficients, scale = _within_one(coefficients.where(rows < len(hidden), 0))
    if mode == "slab":
        _, hidden_gradient, weight_gradient = _in_slabs(
            hidden, weight, targets, rows, count, softcap, with_sum, backend, slab_rows,
            coefficients=coefficients, statistics=statistics, scale=scale, for_hidden=for_hidden, for_weight=for_weight,
        )  # fmt: skip
        return hidden_gradient, scaled(weight_gradient, scale, weight.dtype)
    hidden_gradient, weight_gradient = _zeros(hidden, for_hidden), _zeros(weight, for_weight)
    _steps(backend, rows).gradients(
        hidden, weight, targets, rows, count, statistics[0], coefficients, scale, softcap, with_sum,
        hidden_gradient if for_hidden else None, weight_gradient if for_weight else None,
    )  # fmt: skip
    return hidden_gradient, weight_gradient


def scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * scale, rounded once and with no copy in between.

    The scale is a vector, [1]: a scalar would be rounded to the gradient's dtype before the product.
    """
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def default_slab_rows(vocabulary: int, dtype: torch.dtype, device_type: str) -> int:
    """Rows of logits that exist at a time in `slab`.

    On the CPU 8 MiB of logits, but at least 256 rows. On a GPU 256 MiB, but at least 4,096 rows, as far as they take no more
    than 1 GiB, and always 2,048: each slab reads and writes the whole gradient by the weight in float32.
    """

    def rows_of(size: int) -> int:
        return size // (vocabulary * dtype.itemsize) // 128 * 128

    if device_type == "cpu":
        return max(rows_of(8 * 2**20), 256)
    return max(rows_of(256 * 2**20), min(rows_of(2**30), 4096), 2048)


def _in_slabs(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor,
    softcap: float, with_sum: bool, backend: str, slab_rows: int, *,
    coefficients: Tensor | None = None, statistics: Tensor | None = None, scale: Tensor | None = None,
    z_loss: float = 0.0, for_hidden: bool = False, for_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Statistics, unless given; gradient by hidden times scale; gradient by weight in the dtype of the statistics."""
    weight = dense(weight)
    steps, known, multiplied = _steps(backend, rows), statistics is not None, plain.multiplied(rows, count)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    if statistics is None:
        statistics = plain.no_logits(len(rows), accumulate, hidden.device)
    hidden_gradient = _zeros(hidden, for_hidden)
    # the first product sets the gradient, so that it needs no zeros
    weight_gradient = torch.empty(weight.shape if for_weight else 0, dtype=accumulate, device=weight.device)
    if not multiplied:
        weight_gradient.zero_()
    slab = _even(multiplied, slab_rows or default_slab_rows(len(weight), hidden.dtype, hidden.device.type))
    buffer = _padded_rows(min(slab, multiplied), len(weight), like=hidden)
    for start in range(0, multiplied, slab):
        part = slice(start, min(start + slab, multiplied))
        x = steps.gather(hidden, rows[part])
        logits = torch.mm(x, weight.T, out=buffer[: len(x)])
        towards = coefficients[:, part] if coefficients is not None and (for_hidden or for_weight) else None
        steps.slab(statistics[:, part], logits, targets[part], towards, known, z_loss, softcap, with_sum)
        if for_hidden:
            steps.scatter(hidden_gradient, rows[part], torch.mm(logits, weight), scale)
        if for_weight:
            _add_product(weight_gradient, logits.T, x, beta=min(start, 1))
    return statistics, hidden_gradient, weight_gradient


def _padded_rows(rows: int, columns: int, like: Tensor) -> Tensor:
    """Uninitialised [rows, columns] whose rows begin at multiples of 64 elements, as fast products need for any vocabulary.

    The padding is zero, not uninitialised: oneDNN's bfloat16 product with AMX reads the padding of a strided operand and
    multiplies it by zeros, and zero times NaN is NaN.
    """
    memory = like.new_empty(rows, -(-columns // 64) * 64)
    memory[:, columns:].zero_()
    return memory[:, :columns]


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    if targets.device.type == "cpu" and bool((targets >= vocabulary).any()):
        raise ValueError("targets must lie within the vocabulary, or equal ignore_index")


def _even(rows: int, limit: int) -> int:
    """Size of slabs that share the rows evenly, a multiple of 128 where the limit allows: no product is much smaller."""
    slabs = max(-(-rows // limit), 1)
    return min(limit, -(-rows // (slabs * 128)) * 128) or 1


def _add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """Set total to beta * total + a @ b, summed in the dtype of total."""
    if total.dtype != a.dtype and total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


def _within_one(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients divided by a power of two that brings the largest to 1/2..1, and that power, [1].

    So the gradient of the logits neither vanishes nor overflows in float16, however small or large the upstream gradient.
    """
    largest = coefficients.abs().amax() if coefficients.numel() else coefficients.new_zeros(())
    scale = largest / torch.frexp(largest).mantissa
    scale = scale.where(largest.isfinite() & (largest > 0), 1).reshape(1)
    return coefficients / scale, scale


def _zeros(like: Tensor, wanted: bool) -> Tensor:
    return torch.zeros(like.shape if wanted else 0, dtype=like.dtype, device=like.device)


def _steps(backend: str, rows: Tensor) -> ModuleType:
    if backend == "torch" or not len(rows):  # without rows there is nothing to launch
        return plain
    from sbp_kernels.linear_cross_entropy import launch

    return launch


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Products in the dtypes of their operands: autocast has been applied already."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        with torch.autocast(arguments[0].device.type, enabled=False):
            return function(*arguments)

    return run


INPUTS = "Tensor hidden, Tensor weight, Tensor targets, Tensor rows, Tensor count"
HOW = "float softcap, bool with_sum, str backend, str mode, int slab_rows"
WANTED = "bool for_hidden, bool for_weight"
OPERATIONS = torch.ops.sbp_kernels


def _fake_total_loss(hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for_hidden, for_weight = arguments[-2:]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden_gradient = hidden.new_empty(hidden.shape if for_hidden else 0)
    weight_gradient = weight.new_empty(weight.shape if for_weight else 0, dtype=dtype)
    return hidden.new_empty((), dtype=dtype), hidden.new_empty(1, dtype=dtype), hidden_gradient, weight_gradient


def _fake_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(4, rows.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


def _fake_statistics_backward(
    coefficients: Tensor, statistics: Tensor, hidden: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    for_hidden, for_weight = arguments[-2:]
    return hidden.new_empty(hidden.shape if for_hidden else 0), weight.new_empty(weight.shape if for_weight else 0)


def _fake_scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes, ctx.arguments = (inputs[0].dtype, inputs[1].dtype), len(inputs)
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None, None]
    if upstream is not None:
        scale, *saved = ctx.saved_tensors
        for i, (gradient, dtype) in enumerate(zip(saved, ctx.dtypes, strict=True)):
            if ctx.needs_input_grad[i]:
                gradients[i] = OPERATIONS.linear_cross_entropy_scaled(gradient, scale * upstream, dtype)
    return (*gradients, *[None] * (ctx.arguments - 2))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.constants = inputs[5:]
    ctx.save_for_backward(output, *inputs[:5])


def _recompute_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    wanted, coefficients = ctx.needs_input_grad[:2], upstream[1:].contiguous()
    gradients = OPERATIONS.linear_cross_entropy_statistics_backward(coefficients, *ctx.saved_tensors, *ctx.constants, *wanted)
    returned = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    return (*returned, *[None] * (3 + len(ctx.constants)))


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse(ctx: Any, *upstream: Tensor) -> None:
    raise RuntimeError("linear_cross_entropy can be differentiated once: its gradients have no gradient")


for _schema, _function, _fake, _backward, _save in (
    (
        f"linear_cross_entropy_total({INPUTS}, Tensor row_weight, float z_loss, float label_smoothing, float softcap, "
        f"str backend, int slab_rows, {WANTED}) -> (Tensor, Tensor, Tensor, Tensor)",
        total_loss,
        _fake_total_loss,
        _scale_gradients,
        _save_gradients,
    ),
    (
        f"linear_cross_entropy_statistics({INPUTS}, {HOW}) -> Tensor",
        logit_statistics,
        _fake_statistics,
        _recompute_gradients,
        _save_inputs,
    ),
    (
        f"linear_cross_entropy_statistics_backward(Tensor coefficients, Tensor statistics, {INPUTS}, {HOW}, {WANTED})"
        " -> (Tensor, Tensor)",
        logit_statistics_backward,
        _fake_statistics_backward,
        _refuse,
        _save_nothing,
    ),
    (
        "linear_cross_entropy_scaled(Tensor gradient, Tensor scale, ScalarType dtype) -> Tensor",
        scaled,
        _fake_scaled,
        _refuse,
        _save_nothing,
    ),
):
    register_operation(_schema, _without_autocast(_function), _fake, backward=_backward, save=_save)


def _product(hidden: Tensor, weight: Tensor, rows: Tensor, count: Tensor) -> int:
    """FLOPs of the logits: of the rows with loss where these are known to the host, else of all rows."""
    multiplied = len(rows) if isinstance(count, FakeTensor) else plain.multiplied(rows, count)
    return 2 * multiplied * hidden.shape[1] * len(weight)


@register_flop_formula(OPERATIONS.linear_cross_entropy_total, get_raw=True)
def _total_flops(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor, *rest: Any, **_: Any) -> int:
    return _product(hidden, weight, rows, count) * (1 + rest[-2] + rest[-1])


@register_flop_formula(OPERATIONS.linear_cross_entropy_statistics, get_raw=True)
def _statistics_flops(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor, *_: Any, **__: Any) -> int:
    return _product(hidden, weight, rows, count)


@register_flop_formula(OPERATIONS.linear_cross_entropy_statistics_backward, get_raw=True)
def _backward_flops(coefficients: Tensor, statistics: Tensor, *rest: Any, **_: Any) -> int:
    return _product(rest[0], rest[1], rest[3], rest[4]) * (1 + rest[-2] + rest[-1])
