"""Attention on both of its own paths: plain torch, and the Triton kernels in Triton's interpreter."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import triton
from attention_inputs import inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout, packed_attention
from sbp_kernels.attention import hopper, launch
from sbp_kernels.attention.reference import packed_attention as exact_attention
from sbp_kernels.layout import plan
from sbp_kernels.layout.plan import Tiles
from sbp_kernels.layout.reference import dense_mask
from small_ops import check_errors
from torch import Tensor
from trees import error, forests, rounding, tile_sizes, trees

HEADS = st.sampled_from([(4, 4), (4, 2), (3, 1)])
SMALL = Tiles(16, 16, 16, 16)
KERNELS = ["triton", "triton-hopper"]
FOR_HOPPER = ["triton-hopper", "gluon-hopper"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def with_gradients(attention: Attention, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


def torch_operation(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """What torch itself has for any mask, in the inputs' own dtype."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def recomputed_operation(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: Tensor) -> list[Tensor]:
    """Output and gradients in plain torch, with weights recomputed from a rounded log-sum-exp (FlashAttention-2, algorithm 2).

    The backward pass sums the channels of a score in another order than the forward pass did, as kernels do. Not even the
    weight of a single visible key is exactly 1 then, which it is or is not in torch's fused operation, by the processor.
    """
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    q_HTD, k_HTD, v_HTD, dout_HTD = (x.transpose(0, 1).float() for x in (q, k, v, dout))
    k_HTD, v_HTD = k_HTD.repeat_interleave(group, 0), v_HTD.repeat_interleave(group, 0)
    hidden = ~mask
    scores = (q_HTD @ k_HTD.mT * scale).masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp() @ v_HTD
    again = (q_HTD.flip(-1) @ k_HTD.flip(-1).mT * scale).masked_fill(hidden, float("-inf"))
    weights = (again - lse).exp()
    dscores = weights * (dout_HTD @ v_HTD.mT - (dout_HTD * out).sum(-1, keepdim=True)) * scale
    gradients = [dscores @ k_HTD, dscores.mT @ q_HTD, weights.mT @ dout_HTD]
    gradients[1:] = [x.unflatten(0, (-1, group)).sum(1) for x in gradients[1:]]
    return [x.transpose(0, 1).to(q.dtype) for x in (out, *gradients)]


def assert_accurate(layout: PackedLayout, tensors: list[Tensor], backend: str) -> None:
    """Output and gradients err from float64 by at most twice what torch's operations do.

    The kernels are also held against torch's fused operation on single segments, and against plain torch that recomputes the
    weights from a rounded log-sum-exp, as they do.
    """
    mask = dense_mask(layout).to(tensors[0].device)
    found = with_gradients(lambda *qkv: packed_attention(*qkv, layout, backend=backend), *tensors)
    yardsticks = [with_gradients(lambda *qkv: torch_operation(*qkv, mask), *tensors)]
    if backend != "torch":
        yardsticks.append(with_gradients(lambda *qkv: packed_attention(*qkv, layout, backend="torch"), *tensors))
        yardsticks.append(recomputed_operation(*tensors, mask))
    exact = with_gradients(lambda *qkv: exact_attention(*qkv, layout), *(x.double() for x in tensors))
    for name, mine, right, *theirs in zip(("out", "dq", "dk", "dv"), found, exact, *yardsticks, strict=True):
        allowed = 2 * max(*(error(x, right) for x in theirs), rounding(right, mine.dtype))
        assert mine.isfinite().all() and error(mine, right) <= allowed, name


@pytest.fixture(autouse=True)
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs without work are quick on a GPU but not in the interpreter."""
    monkeypatch.setattr(plan, "MAXIMUM_PARTS", 4)
    monkeypatch.setattr(plan, "SLOTS", 8)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output and workspace is full of NaN before a kernel writes it."""

    class Poison:
        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(self, *arguments: object, **options: object) -> Tensor:
            return torch.empty(*arguments, **options).fill_(float("nan"))

        def empty_like(self, x: Tensor) -> Tensor:
            return torch.empty_like(x).fill_(float("nan"))

    for module in (launch, hopper):
        monkeypatch.setattr(module, "torch", Poison())


def in_poison(x: Tensor, rows: int = 40) -> Tensor:
    """The same values as a view into a larger tensor whose other entries, rows past the end among them, are NaN."""
    tokens, heads, width = x.shape
    outer = torch.full((tokens + rows, heads + 2, width), float("nan"), dtype=x.dtype, device=x.device)
    outer[:tokens, 1:-1] = x
    return outer[:tokens, 1:-1]


def repeated(lengths: list[int], parents: list[int]) -> tuple[list[int], list[int]]:
    """The forest side by side with itself until its errors are many enough to be compared."""
    times = max(1, -(-24 // sum(lengths)))
    shifts = [len(lengths) * index for index in range(times)]
    return lengths * times, [parent if parent < 0 else parent + shift for shift in shifts for parent in parents]


@settings(max_examples=30)
@given(trees(), HEADS)
def test_torch_equals_the_definition_in_float64(layout: PackedLayout, heads: tuple[int, int]) -> None:
    tensors = inputs(len(layout), heads, torch.float64)
    found = with_gradients(lambda *qkv: packed_attention(*qkv, layout), *tensors)
    exact = with_gradients(lambda *qkv: exact_attention(*qkv, layout), *tensors)
    for mine, right in zip(found, exact, strict=True):
        assert error(mine, right) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "forest",
    [
        ([150, 90, 70, 200, 33], [-1, 0, 0, -1, 3]),
        ([8] * 60, [-1] * 60),
        ([7, 8, 9] * 20, [-1] * 60),
        ([8, 8, 9, 4, 8] * 12, [parent for root in range(0, 60, 5) for parent in (-1, root, root, root + 2, -1)]),
    ],
    ids=["segments of their own shapes", "documents of one length", "documents of three lengths", "equal trees"],
)
def test_torch_errs_no_more_than_twice_its_own_operation(forest: tuple[list[int], list[int]], dtype: torch.dtype) -> None:
    layout = PackedLayout.from_tree(*forest)
    assert_accurate(layout, inputs(len(layout), (4, 2), dtype, width=32), "torch")


def test_the_path_for_devices_without_a_fused_operation_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from sbp_kernels.attention import cpu

    layout = PackedLayout.from_tree([5, 3, 9, 4], [-1, 0, 0, -1])
    tensors = inputs(len(layout), (4, 2), torch.float64)
    right = with_gradients(lambda *qkv: packed_attention(*qkv, layout), *tensors)
    monkeypatch.setattr(cpu, "FUSED_ON", ())
    found = with_gradients(lambda *qkv: packed_attention(*qkv, layout), *tensors)
    for mine, fused in zip(found, right, strict=True):
        assert 0 < error(mine, fused) < 1e-14  # another order of sums


@pytest.mark.usefixtures("poisoned")
@settings(max_examples=40)
@given(
    forests(maximum_segments=6, maximum_length=16, maximum_depth=4),
    tile_sizes(16, 32), st.sampled_from([(2, 2), (2, 1), (3, 1)]),
    st.sampled_from([torch.float32, torch.float16]), st.sampled_from([16, 24, 64]), st.sampled_from([2, 32]),
)  # fmt: skip
def test_the_kernels_err_no_more_than_twice_torchs_operation(
    forest: tuple[list[int], list[int]], tiles: Tiles, heads: tuple[int, int], dtype: torch.dtype, width: int, shortest: int
) -> None:
    layout = PackedLayout.from_tree(*repeated(*forest), tiles=tiles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SHORTEST_PART", shortest)
        assert_accurate(layout, [in_poison(x) for x in inputs(len(layout), heads, dtype, width)], "triton")


FORESTS = {
    "one-token segments": ([1] * 37, [-1] * 37),
    "one segment of everything": ([131], [-1]),
    "a seed with 64 children": ([21, *[5] * 64], [-1, *[0] * 64]),
    "four deep": ([19, 23, 17, 33, 9, 12, 31, 8], [-1, 0, 1, 2, 2, 1, 0, -1]),
    "short documents in one tile": ([3, 5, 2, 6, 1, 1, 40, 2], [-1] * 8),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS.keys())
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_on_hard_forests(forest: tuple[list[int], list[int]], backend: str, dtype: torch.dtype) -> None:
    layout = PackedLayout.from_tree(*forest, tiles=Tiles(32, 16, 32, 16))
    tensors = inputs(len(layout), (2, 1), dtype, 64)
    assert_accurate(layout, tensors if backend == "triton-hopper" else [in_poison(x) for x in tensors], backend)


ON_A_GPU = [*FORESTS.values(), ([1500, 300, 700, 40], [-1, 0, 0, -1])]


@pytest.mark.gpu
@pytest.mark.parametrize("forest", ON_A_GPU)
@pytest.mark.parametrize("tiles", [plan.WIDE, plan.NARROW])
@pytest.mark.parametrize("width", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(forest: tuple[list[int], list[int]], tiles: Tiles, width: int, dtype: torch.dtype) -> None:
    layout = PackedLayout.from_tree(*forest, tiles=tiles).to("cuda")
    assert_accurate(layout, [in_poison(x.cuda()) for x in inputs(len(layout), (8, 2), dtype, width)], "triton")


def skip_without_hopper() -> None:
    """The forms for Hopper may race or hang, so that their tests on a GPU are apart from the others."""
    if torch.cuda.get_device_capability() != (9, 0) or not triton.__version__.startswith("3.6."):
        pytest.skip("needs a Hopper GPU and triton 3.6")


@pytest.mark.gpu
@pytest.mark.parametrize("forest", ON_A_GPU)
@pytest.mark.parametrize("tiles", [plan.WIDE, plan.NARROW])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("backend", FOR_HOPPER)
def test_the_form_for_hopper_on_a_gpu(backend: str, forest: tuple[list[int], list[int]], tiles: Tiles, width: int) -> None:
    skip_without_hopper()
    layout = PackedLayout.from_tree(*forest, tiles=tiles).to("cuda")
    assert_accurate(layout, [x.cuda() for x in inputs(len(layout), (8, 2), torch.bfloat16, width)], backend)


@pytest.mark.gpu
@pytest.mark.parametrize("tiles", [plan.WIDE, plan.NARROW])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("backend", FOR_HOPPER)
def test_the_form_for_hopper_repeats_its_bits_on_a_gpu(backend: str, tiles: Tiles, width: int) -> None:
    skip_without_hopper()
    layout = PackedLayout.from_tree([1500, 300, 700, 40, 900, 656], [-1, 0, 0, -1, -1, 4], tiles=tiles).to("cuda")
    q, k, v, _ = (x.cuda() for x in inputs(len(layout), (64, 8), torch.bfloat16, width))
    first, different = packed_attention(q, k, v, layout, backend=backend), torch.zeros((), device="cuda")
    for _ in range(1000):
        different += (packed_attention(q, k, v, layout, backend=backend) != first).any()
    assert not different.item()


@pytest.mark.parametrize("backend", KERNELS)
def test_a_packed_sequence_of_one_token(backend: str) -> None:
    q, k, v, gradient = inputs(1, (4, 2), torch.float32, 16)
    layout = PackedLayout.from_lengths([1], tiles=SMALL)
    out, dq, dk, dv = with_gradients(lambda *qkv: packed_attention(*qkv, layout, backend=backend), q, k, v, gradient)
    assert torch.equal(out, v.repeat_interleave(2, 1)) and torch.equal(dv, gradient.unflatten(1, (2, 2)).sum(2))
    # 0 but for the order of two sums of 16 products, each of which may be off by half a unit in the last place
    products = (gradient * v.repeat_interleave(2, 1)).abs().sum(-1).max()
    size = max(x.abs().max() for x in (q, k)) * products
    assert max(dq.abs().max(), dk.abs().max()) <= 2 * 16 * torch.finfo(torch.float32).eps * size


def test_the_default_tiles_and_a_width_that_is_no_power_of_two() -> None:
    for lengths in ([300], [50] * 6):
        layout = PackedLayout.from_lengths(lengths)
        assert_accurate(layout, inputs(len(layout), (3, 1), torch.float32, 96), "triton")


def test_a_split_seed_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SHORTEST_PART", 1)
    layout = PackedLayout.from_tree([21, *[9] * 12], [-1, *[0] * 12], tiles=SMALL).planned()
    assert layout.plan is not None and (layout.plan.splits[:, 1] > 0).sum() == 2
    assert_accurate(layout, inputs(len(layout), (4, 2), torch.float32, 16), "triton")


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
@settings(max_examples=15)
@given(forests(), st.data())
def test_a_token_changes_nothing_that_must_not_see_it(
    backend: str, forest: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    layout = PackedLayout.from_tree(*forest, tiles=SMALL)
    token = data.draw(st.integers(0, len(layout) - 1))
    q, k, v, gradient = inputs(len(layout), (2, 1), torch.float32, 16)
    mask = dense_mask(layout)

    def both() -> list[Tensor]:
        return with_gradients(lambda *qkv: packed_attention(*qkv, layout, backend=backend), q, k, v, gradient)

    before = both()
    for x in (q, k, v):
        x[token] += 1.0
    out, dq, dk, dv = ((now != then).flatten(1).any(1) for now, then in zip(both(), before, strict=True))
    assert torch.equal(out, mask[:, token])
    assert torch.equal(dq, dq & mask[:, token])
    seen_together = (mask[mask[:, token]]).any(0)  # keys that some query sees along with the token
    assert torch.equal(dk, dk & (seen_together | mask[token])) and torch.equal(dv, dv & (seen_together | mask[token]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_querys_gradient_reaches_what_it_sees_and_nothing_else(backend: str) -> None:
    layout = PackedLayout.from_tree([9, 4, 7, 3, 6], [-1, 0, 1, 0, -1], tiles=SMALL)
    q, k, v, _ = (x.requires_grad_() for x in inputs(len(layout), (2, 1), torch.float32, 16))
    out = packed_attention(q, k, v, layout, backend=backend)
    for query in range(len(layout)):
        gradients = torch.autograd.grad(out[query].square().sum(), (k, v), retain_graph=True)
        reached = [(gradient != 0).flatten(1).any(1) for gradient in gradients]
        sees = dense_mask(layout)[query]
        assert torch.equal(reached[1], sees) and torch.equal(reached[0] & ~sees, torch.zeros_like(sees))


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), ("triton", torch.float32)])
def test_shared_seed_errs_no_more_than_twice_its_pairs_one_by_one(backend: str, dtype: torch.dtype) -> None:
    """With loss on the partners alone: the loss, and the gradients of the parameters that made q, k and v."""
    seed, partners, width = 19, [7, 12, 5], 16
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(length, width, generator=generator, dtype=torch.float64) for length in (seed, *partners)]
    weights = [torch.randn(width, 2 * width, generator=generator, dtype=torch.float64) for _ in range(3)]
    tree = PackedLayout.from_tree([seed, *partners], [-1, 0, 0, 0], tiles=SMALL)
    pairs = [PackedLayout.from_pairs([(seed, length)], tiles=SMALL) for length in partners]

    def results(backend: str, dtype: torch.dtype, alone: bool) -> list[Tensor]:
        leaves = [weight.to(dtype).requires_grad_() for weight in weights]
        parts = [x.to(dtype) for x in hidden]

        def loss(tokens: Tensor, layout: PackedLayout) -> Tensor:
            q, k, v = ((tokens @ leaf).unflatten(1, (2, width)) for leaf in leaves)
            return packed_attention(q, k, v, layout, backend=backend)[seed:].sin()

        if alone:
            losses = [loss(torch.cat([parts[0], part]), layout) for part, layout in zip(parts[1:], pairs, strict=True)]
            losses = torch.cat(losses)
        else:
            losses = loss(torch.cat(parts), tree)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]

    together, one_by_one = results(backend, dtype, alone=False), results(backend, dtype, alone=True)
    exact = results("torch", torch.float64, alone=True)
    if dtype == torch.float64:
        for mine, right in zip(together, exact, strict=True):
            assert error(mine, right) < 1e-14 * (1 + right.abs().max())
    else:
        check_errors(together, one_by_one, exact)


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
def test_log_sum_exp_and_its_gradient(backend: str) -> None:
    layout = PackedLayout.from_tree([9, 14, 7, 3], [-1, 0, 0, -1], tiles=SMALL)
    tensors = inputs(len(layout), (4, 2), torch.float32, 16)
    dlse = torch.randn(4, len(layout), generator=torch.Generator().manual_seed(1))

    def scores(q: Tensor, k: Tensor) -> Tensor:
        scaled = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) / 4
        return scaled.masked_fill(~dense_mask(layout), float("-inf")).logsumexp(-1)

    def differentiated(leaves: list[Tensor], out: Tensor, lse: Tensor) -> list[Tensor]:
        both = (out.double() * tensors[3]).sum() + (lse.double() * dlse).sum()
        return [lse.detach(), *torch.autograd.grad(both, leaves)]

    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    found = differentiated(leaves, *packed_attention(*leaves, layout, backend=backend, return_lse=True))
    leaves = [x.double().requires_grad_() for x in tensors[:3]]
    exact = differentiated(leaves, exact_attention(*leaves, layout), scores(*leaves[:2]))
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    plain = differentiated(leaves, torch_operation(*leaves, dense_mask(layout)), scores(*leaves[:2]))
    for mine, theirs, right in zip(found, plain, exact, strict=True):
        assert error(mine, right) <= 2 * error(theirs, right)


def test_gradients_are_the_same_in_every_run() -> None:
    layout = PackedLayout.from_tree([21, *[9] * 12, 30], [-1, *[0] * 12, -1], tiles=SMALL)
    tensors = inputs(len(layout), (4, 2), torch.float16, 16)
    runs = [with_gradients(lambda *qkv: packed_attention(*qkv, layout, backend="triton"), *tensors) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_strides_of_any_kind() -> None:
    layout = PackedLayout.from_lengths([20, 13], tiles=SMALL)
    q, k, v, gradient = inputs(33, (2, 2), torch.float32, 16)
    right = with_gradients(lambda *qkv: packed_attention(*qkv, layout, backend="triton"), q, k, v, gradient)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, gradient)]
    width_first = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v, gradient)]
    for tensors in (heads_first, width_first):
        found = with_gradients(lambda *qkv: packed_attention(*qkv, layout, backend="triton"), *tensors)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, right, strict=True))
