"""Decode attention by every backend; the Triton kernels in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from paged import Batch, Group, batch, groups, torch_operation
from sbp_kernels import DecodeLayout, append_to_pages, decode_attention
from sbp_kernels.decode import api, triton
from sbp_kernels.decode.reference import decode_attention as exact_attention
from small_ops import INTERPRETED, check_errors, guarded_memory
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from trees import error

FP8 = torch.float8_e4m3fn
MIXED: list[Group] = [(33, [1, 0, 40, 7]), (0, [5, 16, 0, 0]), (64, [17, 32, 31, 2])]


@contextmanager
def small_splits(step: int = 16, split: int = 32, widest: int = 64) -> Iterator[None]:
    """So that short sequences have several splits, of several steps."""
    whole = triton.partial_options
    options = {"SPLIT_TOKENS": split, "WIDEST_TILE": widest, "partial_options": lambda *x: {**whole(*x), "STEP": step}}
    with mock.patch.multiple(triton, **options), guarded_memory():
        yield


def live(case: Batch, *results: Tensor) -> list[Tensor]:
    """The rows of samples; those of idle rows are zeros."""
    rows = torch.tensor(list(case.rows.values()), dtype=torch.int64, device=case.q.device)
    for out in results:
        idle = torch.ones(len(out), dtype=torch.bool, device=out.device).index_fill(0, rows, False)
        assert not out[idle].any()
    return [out[rows] for out in results]


def check(case: Batch, backend: str) -> None:
    """A result errs at most twice as much as torch's own operation in its dtype, or the plain form."""
    mine, plain = (decode_attention(*case.arguments, backend=name) for name in (backend, "torch"))
    mine, plain, theirs, right = live(case, mine, plain, torch_operation(case), exact_attention(*case.arguments))
    if len(right):
        check_errors([mine], [max(plain, theirs, key=lambda x: error(x, right))], [right])


@settings(max_examples=40)
@given(groups(), st.sampled_from([(2, 2), (4, 2), (3, 1)]))
def test_torch_equals_the_definition_in_float64(of: list[Group], heads: tuple[int, int]) -> None:
    case = batch(of, heads, dtype=torch.float64)
    found, right = live(case, decode_attention(*case.arguments), exact_attention(*case.arguments))
    assert not len(right) or error(found, right) < 1e-14


@settings(max_examples=30)
@given(
    groups(),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([16, 32, 128]),
    st.sampled_from(INTERPRETED),
    st.sampled_from([16, 32, 64]),
    st.sampled_from([32, 64]),
    st.integers(0, 9),
)
@example(MIXED, (6, 2), 16, torch.float16, 32, 32, 0)
@example(MIXED, (6, 2), 32, torch.float32, 16, 32, 1)
@example([(0, [1])], (6, 2), 16, torch.float32, 16, 32, 2)
def test_triton_errs_no_more_than_twice_torch(
    of: list[Group], heads: tuple[int, int], page: int, dtype: torch.dtype, step: int, split: int, seed: int
) -> None:
    case = batch(of, heads, page=page, dtype=dtype, seed=seed)
    with small_splits(step, max(split, page)):
        check(case, "triton")


@pytest.mark.parametrize("width", [8, 24, 40])
@pytest.mark.parametrize("dtype", INTERPRETED)
def test_heads_of_any_width(width: int, dtype: torch.dtype) -> None:
    case = batch(MIXED, width=width, dtype=dtype)
    with small_splits():
        check(case, "triton")


@pytest.mark.parametrize(("heads", "widest"), [((6, 1), 16), ((24, 1), 64), ((20, 1), 16)])
def test_more_queries_than_a_tile_holds(heads: tuple[int, int], widest: int) -> None:
    case = batch(MIXED, heads)
    with small_splits(widest=widest):
        check(case, "triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", INTERPRETED)
def test_pages_of_float8(backend: str, dtype: torch.dtype) -> None:
    case = batch(MIXED, dtype=dtype, stored=FP8)
    with small_splits() if backend == "triton" else nullcontext():
        check(case, backend)


@settings(max_examples=10)
@given(groups(), groups(), st.integers(0, 50), st.integers(0, 3), st.sampled_from(INTERPRETED))
@example([(64, [33, 0])], [(7, [1, 2]), (40, [64, 65])], 3, 1, torch.float16)
def test_a_row_is_the_same_bits_in_every_batch(
    of: list[Group], others: list[Group], seed: int, spare: int, dtype: torch.dtype
) -> None:
    """In other rows, slots and pages, among other groups, and with the other samples of its group there or not."""
    cases = [
        batch(of, (3, 1), dtype=dtype),
        batch([*of, *others], (3, 1), dtype=dtype, spare=1 + spare, seed=seed),
        batch([(of[0][0], [of[0][1][0], 0])], (3, 1), dtype=dtype, idle=0),  # one sample alone
    ]
    with small_splits():
        first, *rest = (decode_attention(*case.arguments, backend="triton") for case in cases)
    for other, out in zip(cases[1:], rest, strict=True):
        for name in cases[0].rows.keys() & other.rows.keys():
            assert torch.equal(first[cases[0].rows[name]], out[other.rows[name]])


def test_every_run_gives_the_same_bits() -> None:
    case = batch(MIXED)
    with small_splits():
        first, second = (decode_attention(*case.arguments, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_scale_and_extreme_scores(backend: str) -> None:
    """The largest score of one part may be far from that of another, to either side."""
    case = batch([(40, [40, 40])], (2, 1))
    for factor in (1e-3, 100.0):
        found = decode_attention(*case.arguments, softmax_scale=factor, backend=backend)
        check_errors(*(live(case, x) for x in (found, found, exact_attention(*case.arguments, factor))))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_of_any_kind(backend: str) -> None:
    case = batch(MIXED)
    right = decode_attention(*case.arguments, backend=backend)
    q = torch.full((len(case.q), 8, 20), float("nan"))[:, 1:-1, 3:-1].copy_(case.q)
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.keys, case.values)]
    assert torch.equal(decode_attention(q, *tokens_first, case.layout, backend=backend), right)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_to_do(backend: str) -> None:
    keys = torch.full((1, 2, 16, 8), float("nan"))
    for groups_, samples, rows, pages in ((1, 1, 0, 1), (0, 1, 0, 0), (1, 0, 2, 1), (2, 3, 4, 2)):
        layout = DecodeLayout.empty(groups_, samples, rows, pages, pages)
        out = decode_attention(torch.full((rows, 4, 8), float("nan")), keys, keys, layout, backend=backend)
        assert out.shape == (rows, 4, 8) and not out.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, torch.float32), (torch.float16, FP8), (torch.float32, FP8)])
def test_append_writes_the_newest_token_and_nothing_else(backend: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    case = batch(MIXED, (6, 3), width=24, dtype=dtype, stored=stored, idle=2)
    k, v = (torch.randn(len(case.q), 3, 24, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(2))
    k[:, 0, :3], v[:, 2, 1] = torch.tensor([448.0, -449.0, 6e4]), -500.0
    if stored == FP8:  # the interpreter rounds to float8 in its own way, and has no subnormal ones
        k, v = (x.to(FP8).to(dtype).where((x.abs() > 0.02) & (x.abs() <= 448), 1000 * x.sign()) for x in (k, v))
    expected = [x.clone().view(torch.uint8) if stored == FP8 else x.clone() for x in (case.keys, case.values)]
    for row in range(len(k)):
        newest = int(case.layout.own_tokens[row]) - 1
        for cache, x in zip(expected, (k, v), strict=True):
            if newest >= 0:
                new = x[row].clamp(-448, 448).to(FP8).view(torch.uint8) if stored == FP8 else x[row]
                cache[case.layout.own_pages[row, newest // 16], :, newest % 16] = new
    append_to_pages(case.keys, case.values, k, v, case.layout, backend=backend)
    for cache, right in zip((case.keys, case.values), expected, strict=True):
        found = cache.view(torch.uint8) if stored == FP8 else cache
        assert torch.equal(found[1:].nan_to_num(7), right[1:].nan_to_num(7))
        changed = found[0].nan_to_num(7) != right[0].nan_to_num(7)
        assert changed[:, 0].any() and not changed[:, 1:].any()  # page 0 takes what idle rows write


def test_positions_continue_where_the_seed_ended() -> None:
    layout = DecodeLayout.empty(2, 2, 4, 1, 1)
    layout.seed_tokens.copy_(torch.tensor([9, 0]))
    layout.row_group.copy_(torch.tensor([0, 1, 0, 1]))
    layout.own_tokens.copy_(torch.tensor([1, 5, 0, 0]))
    assert layout.positions.tolist() == [9, 4, 8, 0] and layout.positions.dtype == torch.int32


def test_opcheck() -> None:
    case = batch(MIXED)
    k = torch.randn(len(case.q), 2, 16)
    tables = (case.layout.own_pages, case.layout.own_tokens)
    torch.library.opcheck(torch.ops.sbp_kernels.decode_attention, (*case.arguments[:3], *case.layout.tensors, 0.5))
    torch.library.opcheck(torch.ops.sbp_kernels.append_to_pages, (k, k, case.keys, case.values, *tables))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_whole_and_once_for_all_contents(backend: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(q: Tensor, k: Tensor, keys: Tensor, values: Tensor, tensors: list[Tensor]) -> Tensor:
        layout = DecodeLayout(*tensors)
        append_to_pages(keys, values, k, 2 * k, layout, backend=backend)
        return decode_attention(q * layout.positions[:, None, None], keys, values, layout, backend=backend)

    case = batch([(20, [9, 9])], idle=2)
    tensors = list(case.layout.tensors)
    for own in (9, 10, 11):
        case.layout.own_tokens.masked_fill_(case.layout.own_tokens > 0, own)
        k = torch.randn(len(case.q), 2, 16)
        caches = [x.clone() for x in (case.keys, case.values)]
        append_to_pages(*caches, k, 2 * k, case.layout, backend=backend)
        q = case.q.nan_to_num()
        right = decode_attention(q * case.layout.positions[:, None, None], *caches, case.layout, backend=backend)
        assert torch.equal(step(q, k, case.keys, case.values, tensors), right)
        assert torch.equal(case.keys[1:].nan_to_num(7), caches[0][1:].nan_to_num(7))
    assert counter.frame_count == 1


def test_bad_layouts_are_refused() -> None:
    tensors = dict(zip(DecodeLayout.__dataclass_fields__, DecodeLayout.empty(3, 2, 5, 4, 4).tensors, strict=True))
    for name, x, message in [
        ("seed_pages", torch.zeros(2, 4).int(), r"seed_pages must be \[3, any\]: got \(2, 4\)"),
        ("group_rows", torch.zeros(3).int(), r"group_rows must be \[3, any\]"),
        ("row_group", torch.zeros(4).int(), r"row_group must be \[5\]: got \(4,\)"),
        ("own_tokens", torch.zeros(5), r"own_tokens must be int32 on cpu, contiguous: got torch.float32"),
        (
            "own_pages",
            torch.zeros(5, 4).int().to("meta"),
            "own_pages must be int32 on cpu, contiguous: got torch.int32 on meta",
        ),
        ("own_pages", torch.zeros(4, 5).int().T, "own_pages must be .* not contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            DecodeLayout(**{**tensors, name: x})


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys, values, layout = batch(MIXED).arguments
    half, wide = keys.half(), torch.zeros(2, 2, 16, 300)
    for arguments, options, message in [
        ((q[0], keys, values, layout), {}, r"q must be \[B, heads, D\]"),
        ((q, keys, values[:1], layout), {}, r"keys and values \[pages, heads, tokens, D\], alike"),
        ((q[:, :5], keys, values, layout), {}, "q has 5 heads, keys 2: heads of q must be a multiple"),
        ((q[..., :8], keys, values, layout), {}, "must agree in rows and width"),
        ((q[:1], keys, values, layout), {}, "must agree in rows and width"),
        ((q, keys.to("meta"), values.to("meta"), layout), {}, "must be on one device"),
        ((q, keys, values, layout), {"softmax_scale": 0}, "softmax_scale must be positive, got 0"),
        ((q, keys, values, layout), {"backend": "cuda"}, "backend 'cuda' is unknown: use one of auto, triton, torch, numba"),
        ((q, half, half, layout), {"backend": "numba"}, "'numba' takes float32 tensors on the CPU, not torch.float32 beside"),
        ((q.double(), keys, values, layout), {"backend": "triton"}, "not torch.float64 beside pages of torch.float32"),
        ((q, keys[:, :, :12], values[:, :, :12], layout), {"backend": "triton"}, "take pages of .* not 12 tokens"),
        (
            (q.new_zeros(len(q), 2, 300), wide, wide, layout),
            {"backend": "triton"},
            "up to 256 wide, not 16 tokens of width 300",
        ),
        ((q, *(x.mT.contiguous().mT for x in (keys, values)), layout), {"backend": "triton"}, "side by side in memory"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_attention(*arguments, **options)
    k = torch.zeros(len(q), 2, 16)
    for arguments, options, message in [
        ((keys, values, k[:, :1], k[:, :1], layout), {}, r"k and v must be \[B, 2, D\], alike"),
        ((keys, values, k, k.half(), layout), {}, "k and v must be"),
        ((keys, values, k, k, layout), {"backend": "numba"}, "append_to_pages has no backend 'numba'"),
    ]:
        with pytest.raises(ValueError, match=message):
            append_to_pages(*arguments, **options)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match="'triton' needs CUDA tensors: move them, use backend='torch', or set TRITON_INTERPRET"
    ):
        decode_attention(q, keys, values, layout, backend="triton")


def test_float8_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"is_cuda": True, "device": torch.device("cuda"), "shape": (2, 2, 16, 64)}
    q, keys = (mock.Mock(dtype=dtype, **shared) for dtype in (torch.bfloat16, FP8))
    keys.stride.return_value = 1
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match=r"need compute capability 8\.9, this device has 8\.0: keep them in bfloat16"):
        api._resolved("triton", q, keys, keys)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    assert api._resolved("auto", q, keys, keys) == api._resolved("triton", q, keys, keys) == "triton"


def test_auto_is_the_first_that_can_run() -> None:
    wide, half = torch.zeros(1, 1, 16, 8), torch.zeros(1, 1, 16, 8, dtype=torch.float16)
    assert api._resolved("auto", wide, wide, wide) == "numba"
    assert api._resolved("auto", half, half, half) == api._resolved("auto", wide, half, half) == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("samples", [1, 4, 8, 30])
@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, FP8)]
)
def test_on_a_gpu(samples: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    of = [(seed, [(seed + 3 * n) % 700 + 1 for n in range(samples)]) for seed in (1, 512, 1100, 0)]
    if stored == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8")
    case = batch(of, (24, 8), 128, 64, dtype, stored, device="cuda")
    check(case, "triton")
    k = torch.randn(len(case.q), 8, 128, device="cuda").to(dtype)
    caches = [x.clone() for x in (case.keys, case.values)]
    append_to_pages(*caches, k, k, case.layout, backend="torch")
    append_to_pages(case.keys, case.values, k, k, case.layout)
    assert torch.equal(case.keys[1:].float().nan_to_num(7), caches[0][1:].float().nan_to_num(7))
    case = batch(of, (24, 8), 128, 64, dtype, stored, device="cuda")
    again = batch([*of, (70, [5] * samples)], (24, 8), 128, 64, dtype, stored, seed=5, device="cuda")
    first, second = (decode_attention(*x.arguments) for x in (case, again))
    assert all(torch.equal(first[row], second[again.rows[name]]) for name, row in case.rows.items())
