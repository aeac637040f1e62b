"""The parts of attention over packed segments, which the plain torch path computes as batches."""

from unittest.mock import patch

import torch
from hypothesis import given, settings
from sbp_kernels import PackedLayout, packed_attention
from sbp_kernels.attention import cpu
from sbp_kernels.attention.parts import Rows, find_parts
from sbp_kernels.layout.reference import dense_mask
from torch import Tensor
from trees import trees


def rows_of(rows: Rows, tokens: int) -> Tensor:
    return rows.take(torch.arange(tokens).unsqueeze(1)).squeeze(1)  # [N, L]


@settings(max_examples=50)
@given(trees())
def test_parts_meet_each_visible_pair_once(layout: PackedLayout) -> None:
    met = torch.zeros(len(layout), len(layout), dtype=torch.int64)
    for part in find_parts(layout.visible_until):
        queries, keys = rows_of(part.queries, len(layout)), rows_of(part.keys, len(layout))
        for block, other in zip(queries, keys, strict=True):
            pairs = torch.ones(len(block), len(other), dtype=torch.int64)
            met[block[:, None], other] += pairs.tril() if part.causal else pairs
    assert torch.equal(met, dense_mask(layout).long())


@settings(max_examples=50)
@given(trees())
def test_first_parts_of_queries_and_causal_parts_of_keys_come_first(layout: PackedLayout) -> None:
    queries_met, keys_met = set[int](), set[int]()
    for part in find_parts(layout.visible_until):
        queries = rows_of(part.queries, len(layout)).flatten().tolist()
        keys = rows_of(part.keys, len(layout)).flatten().tolist()
        assert len(set(queries)) == len(queries) and len(set(keys)) == len(keys)
        assert part.first == queries_met.isdisjoint(queries) and part.causal == keys_met.isdisjoint(keys)
        queries_met.update(queries)
        keys_met.update(keys)


def test_a_thousand_documents_of_one_length_take_one_operation() -> None:
    layout = PackedLayout.from_lengths([8] * 1000)
    q, k, v = torch.randn(3, len(layout), 2, 16).unbind()
    with patch.object(cpu, "_attend", wraps=cpu._attend) as attend:
        packed_attention(q, k, v, layout, backend="torch")
    assert attend.call_count == 1


def test_a_document_among_others_of_its_length_has_the_bits_it_has_alone() -> None:
    torch.manual_seed(0)
    q, k, v, gradient = torch.randn(4, 8 * 9 + 5, 2, 16).unbind()
    together = run(PackedLayout.from_lengths([8, 5, *[8] * 8]), q, k, v, gradient)
    alone = run(PackedLayout.from_lengths([8]), *(x[13:21] for x in (q, k, v, gradient)))
    for many, one in zip(together, alone, strict=True):
        assert torch.equal(many[13:21], one)


def run(layout: PackedLayout, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = packed_attention(*leaves, layout, backend="torch")
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]
