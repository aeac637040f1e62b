"""Launchers of the kernels of `linear_cross_entropy`: tiles, warps and pipeline stages, grids and workspaces.

The launchers have the signatures of the steps in `cpu`; sizes and tensors are described in
`operations`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sbp_kernels.linear_cross_entropy import triton as kernels

Options = dict[str, Any]

SPLITS = 32  # of the vocabulary, in the statistics: enough units of work for a device, few partial results to combine
PANEL_BYTES = 128 * 2**20  # of the gradient of the logits that exists at a time in the backward pass of `recompute`


def product_options(dtype: torch.dtype, large: bool, softcapped_gradient: bool = False) -> Options:
    """Tile, warps and stages of a product; float32 is multiplied exactly, without tensor cores.

    Args:
        dtype: of the operands.
        large: the device has the shared memory and the warpgroup products that large tiles need; see `large_tiles`.
        softcapped_gradient: what follows the product takes so many registers that they would spill beside a large tile.
    """
    if dtype == torch.float32:
        tile, launch = (64, 64, 32), {"num_warps": 8, "num_stages": 2}
    elif not large:
        tile, launch = (64, 128, 32), {"num_warps": 4, "num_stages": 3}
    elif softcapped_gradient:
        tile, launch = (128, 128, 64), {"num_warps": 8, "num_stages": 4}
    else:
        tile, launch = (128, 256, 64), {"num_warps": 8, "num_stages": 3}
    precision = "ieee" if dtype == torch.float32 else "tf32"
    return {**dict(zip(("ROWS", "COLUMNS", "INNER"), tile, strict=True)), "GROUP": 16, "PRECISION": precision, **launch}


def slab_options(vocabulary: int) -> Options:
    """Block, warps and stages of the kernel of a slab."""
    return {"BLOCK": min(4096, triton.next_power_of_2(vocabulary)), "num_warps": 8, "num_stages": 2}


def row_options(width: int) -> Options:
    """Block, warps and stages of the kernels that copy rows."""
    return {"BLOCK": min(2048, triton.next_power_of_2(width)), "num_warps": 4, "num_stages": 1}


COMBINE_OPTIONS: Options = {"BLOCK": 128, "num_warps": 4, "num_stages": 1}


def large_tiles(device: torch.device) -> bool:
    """Whether products run in large tiles: on data-centre GPUs since Hopper."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def gather(source: Tensor, rows: Tensor) -> Tensor:
    """[B, H] of source [T, H]; zeros where a row is T."""
    source = source if source.stride(1) == 1 else source.contiguous()
    out = torch.empty(len(rows), source.shape[1], dtype=source.dtype, device=source.device)
    _over_rows(kernels.gather_rows_kernel, source, rows, out, source.stride(0), out.stride(0), *source.shape)
    return out


def scatter(out: Tensor, rows: Tensor, part: Tensor, scale: Tensor | None) -> None:
    """Set out [T, H] at rows [B] to scale * part [B, H]; nothing where a row is T."""
    _over_rows(kernels.scatter_rows_kernel, part, rows, scale, out, part.stride(0), out.stride(0), *out.shape)


def _over_rows(kernel: Any, first: Tensor, rows: Tensor, *arguments: Any) -> None:
    options = row_options(arguments[-1])
    kernel[(len(rows), triton.cdiv(arguments[-1], options["BLOCK"]))](first, rows, *arguments, **options)


def slab(
    statistics: Tensor, logits: Tensor, targets: Tensor, coefficients: Tensor | None, known: bool,
    z_loss: float, softcap: float, with_sum: bool,
) -> None:  # fmt: skip
    """Statistics [4, B] of logits [B, V], unless known, and with coefficients [3, B] the gradient in place of the logits.

    The coefficients are gradients of a loss by the statistics but the first, where these are known; else the first of them is
    its gradient by the log-sum-exp, to which that of z_loss is added.
    """
    kernels.slab_kernel[(len(logits),)](
        logits, targets, statistics, coefficients, logits.stride(0), statistics.stride(0),
        0 if coefficients is None else coefficients.stride(0), logits.shape[1], z_loss, softcap,
        HAS_SOFTCAP=softcap > 0, WITH_SUM=with_sum, STATISTICS=not known, GRADIENT=coefficients is not None,
        **slab_options(logits.shape[1]),
    )  # fmt: skip


def statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor, softcap: float, with_sum: bool
) -> Tensor:
    """Statistics [4, C], without logits in memory."""
    options = product_options(hidden.dtype, large_tiles(hidden.device))
    x, weight, vocabulary = gather(hidden, rows), _aligned(weight), len(weight)
    partial = torch.empty(SPLITS, 4, len(rows), dtype=torch.float32, device=hidden.device)
    kernels.statistics_kernel[(_programs(hidden.device),)](
        _tiles(x, options, "ROWS", "INNER"), _tiles(weight, options, "COLUMNS", "INNER"), targets, count, partial,
        *partial.stride()[:2], vocabulary, x.shape[1], softcap,
        SPLITS=SPLITS, HAS_SOFTCAP=softcap > 0, WITH_SUM=with_sum, **options,
    )  # fmt: skip
    out = torch.empty(4, len(rows), dtype=torch.float32, device=hidden.device)
    kernels.combine_kernel[(triton.cdiv(len(rows), COMBINE_OPTIONS["BLOCK"]),)](
        partial, targets, count, out, *partial.stride()[:2], out.stride(0), len(rows), vocabulary,
        SPLITS=SPLITS, **COMBINE_OPTIONS,
    )  # fmt: skip
    return out


def gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor, count: Tensor, largest: Tensor, coefficients: Tensor,
    scale: Tensor, softcap: float, with_sum: bool, hidden_gradient: Tensor | None, weight_gradient: Tensor | None,
) -> None:  # fmt: skip
    """Fill hidden_gradient [T, H], zeros before, at the rows, and weight_gradient [V, H].

    The gradient of the logits is computed again for one panel of the vocabulary after the other.
    """
    grid = (_programs(hidden.device),)
    options = product_options(hidden.dtype, large_tiles(hidden.device))
    gradient_options = product_options(hidden.dtype, large_tiles(hidden.device), softcap > 0)
    x, weight, (vocabulary, width) = gather(hidden, rows), _aligned(weight), weight.shape
    panel = panel_columns(len(rows), vocabulary, hidden.dtype)
    buffer = torch.empty(len(rows), panel, dtype=hidden.dtype, device=hidden.device)
    whole_tiles = [triton.cdiv(size, options[side]) * options[side] for size, side in ((len(rows), "ROWS"), (width, "COLUMNS"))]
    total = torch.empty(whole_tiles if hidden_gradient is not None else 0, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocabulary, panel):
        w = weight[start : start + panel]
        columns, gradient = len(w), buffer[:, : len(w)]
        kernels.logit_gradient_kernel[grid](
            _tiles(x, gradient_options, "ROWS", "INNER"), _tiles(w, gradient_options, "COLUMNS", "INNER"),
            _tiles(gradient, gradient_options, "ROWS", "COLUMNS"), targets, count, largest, coefficients,
            coefficients.stride(0), start, columns, width, softcap,
            HAS_SOFTCAP=softcap > 0, WITH_SUM=with_sum, **gradient_options,
        )  # fmt: skip
        if hidden_gradient is not None:
            kernels.hidden_gradient_kernel[grid](
                _tiles(gradient, options, "ROWS", "INNER"), _tiles(w, options, "INNER", "COLUMNS"),
                count, total, total.stride(0), columns, width, ACCUMULATE=start > 0, **options,
            )  # fmt: skip
        if weight_gradient is not None:
            kernels.weight_gradient_kernel[grid](
                _tiles(gradient, options, "INNER", "ROWS"), _tiles(x, options, "INNER", "COLUMNS"),
                _tiles(weight_gradient[start : start + panel], options, "ROWS", "COLUMNS"),
                count, scale, columns, width, **options,
            )  # fmt: skip
    if hidden_gradient is not None:
        scatter(hidden_gradient, rows, total, scale)


def panel_columns(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Columns of the gradient of the logits that exist at a time: a multiple of 512, at least that."""
    return min(max(PANEL_BYTES // (rows * dtype.itemsize * 512), 1), triton.cdiv(vocabulary, 512)) * 512


def _aligned(weight: Tensor) -> Tensor:
    """A copy where tiles could not be read: rows must be dense and, like the first, begin at a multiple of 16 bytes."""
    dense = weight.stride(1) == 1 and weight.stride(0) * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    return weight if dense else weight.clone(memory_format=torch.contiguous_format)


def _tiles(tensor: Tensor, options: Options, *sides: str) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [options[side] for side in sides])


def _programs(device: torch.device) -> int:
    """Enough to fill the device, each of which takes its share of the tiles."""
    if device.type != "cuda":
        return 3  # interpreted one after the other; several, so that a test sees how they share the work
    return torch.cuda.get_device_properties(device).multi_processor_count * (1 if large_tiles(device) else 4)
