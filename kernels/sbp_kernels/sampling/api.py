"""`sample_tokens`: one token a row by temperature, top-k and top-p, from one given uniform number a row.

Sampling is by inverse transform: the token of a row depends on its logits and its uniform number alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sbp_kernels._backends import runs_triton
from sbp_kernels._registration import register_operation

COLDEST = 1e-30  # the inverse is a float32; none but the most probable tokens are left long before
Sampled = tuple[Tensor, Tensor]
# (logits, uniforms, temperature, top_p, top_k, forbidden) -> tokens, log-probabilities
Sampler = Callable[[Tensor, Tensor, float, float, int, Tensor | None], Sampled]


def sample_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    forbidden: Tensor | None = None,
    backend: str = "auto",
) -> Sampled:
    """Sample one token a row from softmax(logits / temperature), cut to the `top_k` most probable and then to their nucleus.

    The nucleus is the smallest set of most probable tokens that holds `top_p` of the probability that top-k left (Holtzman
    et al. 2020, section 3.1). Of equal tokens at an edge, those with lower ids are in. Sampling inverts the cumulative
    distribution over what is left in the order of ids. Tokens are ordered by their logits and their probabilities are
    rounded to float32, so that backends may differ in the last token of a nucleus, by rounding.

    Args:
        logits: [B, V] float32, bfloat16 or float16 (float64 with backend "torch"); fastest in 16 bits on CUDA;
            finite, or -inf for a token of probability zero. In each row one that is not forbidden is finite.
        uniforms: [B] float64 in [0, 1).
        temperature: of the distribution; 0 takes the most probable token, of equal ones the lowest id, and no uniform.
        top_p: in (0, 1]; 1 cuts nothing.
        top_k: how many tokens are left at most; 0 cuts nothing.
        forbidden: int64 [F] ids below V that are never sampled; the others share their probability.
        backend: "triton", for CUDA tensors (and for any where TRITON_INTERPRET=1 is set, which is slow and for checking);
            "numba", on the CPU; "torch", for every device; or "auto", the first of these that can run.

    Returns:
        int64 [B] token ids, and float32 [B] their log-probabilities under softmax(logits) itself, at temperature 1 and with
        nothing forbidden or cut. Not differentiable.

    Raises:
        ValueError: naming the argument that does not fit, or a backend that is unknown or cannot run here.
    """
    _check(logits, uniforms, forbidden)
    if not temperature >= 0 or not 0 < top_p <= 1 or top_k < 0:
        given = f"temperature={temperature}, top_p={top_p}, top_k={top_k}"
        raise ValueError(f"temperature and top_k must be at least 0, top_p in (0, 1]: got {given}")
    if temperature > 0:
        temperature = max(temperature, COLDEST)
    return BACKENDS[_resolved(backend, logits)](logits, uniforms, float(temperature), float(top_p), top_k, forbidden)


def _plain(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int, forbidden: Tensor | None) -> Sampled:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    allowed = wide if forbidden is None else wide.index_fill(1, forbidden, float("-inf"))
    if temperature == 0:
        tokens = allowed.argmax(-1)  # the first of equals
    else:
        weights = ((allowed - allowed.amax(-1, keepdim=True)) / temperature).exp()
        if top_k or top_p < 1:
            weights = weights * _nucleus(allowed, weights, top_p, top_k)
        tokens = _sampled(weights, uniforms)
    log_probabilities = wide.log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens, log_probabilities.float()


def _nucleus(logits: Tensor, weights: Tensor, top_p: float, top_k: int) -> Tensor:
    """Mask, bool [B, V], of the tokens that top-k and top-p leave, by sorting."""
    _, ids = logits.sort(descending=True, stable=True)
    sorted_weights = weights.gather(1, ids)
    cumulative = sorted_weights.cumsum(-1, dtype=torch.float64)
    kept = torch.ones_like(cumulative, dtype=torch.bool)
    left = cumulative.shape[1] if top_k == 0 else min(top_k, cumulative.shape[1])
    kept[:, left:] = False
    if top_p < 1:
        kept &= cumulative - sorted_weights < top_p * cumulative[:, left - 1 : left]
    return torch.zeros_like(kept).scatter_(1, ids, kept)


def _sampled(weights: Tensor, uniforms: Tensor) -> Tensor:
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    whole = cumulative[:, -1:]
    passed = (cumulative <= uniforms.unsqueeze(1) * whole).sum(-1)
    return passed.minimum((cumulative < whole).sum(-1))  # the last with a weight, where rounding ends beyond it


def _compiled(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int, forbidden: Tensor | None
) -> Sampled:
    from sbp_kernels.sampling.cpu import sample

    ids = torch.zeros(0, dtype=torch.int64) if forbidden is None else forbidden
    arrays = [x.contiguous().numpy() for x in (logits.detach().float(), uniforms, ids)]
    tokens, log_probabilities = sample(*arrays, temperature, top_p, top_k)
    return torch.from_numpy(tokens), torch.from_numpy(log_probabilities)


def _fused(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int, forbidden: Tensor | None) -> Sampled:
    return torch.ops.sbp_kernels.sample_tokens(logits, uniforms, temperature, top_p, top_k, forbidden)


BACKENDS: dict[str, Sampler] = {"triton": _fused, "numba": _compiled, "torch": _plain}


def _resolved(backend: str, logits: Tensor) -> str:
    compilable = logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if backend == "numba" and not compilable:
        given = f"{logits.dtype} on {logits.device}"
        raise ValueError(f"backend 'numba' takes logits of 16 or 32 bits on the CPU, not {given}: use backend='torch'")
    if backend == "numba" or (backend == "auto" and compilable):
        return "numba"
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r} is unknown: use one of auto, torch, triton, numba")
    return "triton" if runs_triton(backend, logits) else "torch"


def _check(logits: Tensor, uniforms: Tensor, forbidden: Tensor | None) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating-point [B, V]: got {logits.dtype} {tuple(logits.shape)}")
    if uniforms.shape != logits.shape[:1] or uniforms.dtype != torch.float64:
        raise ValueError(f"uniforms must be float64 [{len(logits)}]: got {uniforms.dtype} {tuple(uniforms.shape)}")
    if forbidden is not None and (forbidden.dim() != 1 or forbidden.dtype != torch.int64):
        raise ValueError(f"forbidden must be int64 [F]: got {forbidden.dtype} {tuple(forbidden.shape)}")
    devices = {x.device for x in (logits, uniforms, forbidden) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"logits, uniforms and forbidden must be on one device: got {sorted(map(str, devices))}")


def _fake(logits: Tensor, *_: object) -> Sampled:
    rows = logits.shape[:1]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)


register_operation(
    "sample_tokens(Tensor logits, Tensor uniforms, float temperature, float top_p, int top_k, Tensor? forbidden) "
    "-> (Tensor, Tensor)",
    "sampling.triton.sample_tokens",
    _fake,
)
