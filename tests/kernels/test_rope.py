from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sbp_kernels import PackedLayout
from sbp_kernels.rope import QKNormRope, qk_norm_rope, reference, rotary_frequencies
from sbp_kernels.rope import api as rope
from sbp_kernels.rope import triton as rope_kernels
from small_ops import INTERPRETED, check_errors, guarded_memory, strided, with_gradients
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

FURTHEST = 131_072


@contextmanager
def small_blocks(tile: int = 128, heads_of_a_program: int = 2) -> Iterator[None]:
    """So few tokens and heads to a program that a small input takes several."""
    with mock.patch.multiple(rope_kernels, TILE=tile, HEADS_OF_A_PROGRAM=heads_of_a_program), guarded_memory():
        yield


def inputs(
    tokens: int, heads: tuple[int, int], width: int, dtype: torch.dtype, device: str = "cpu", furthest: int = 4
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Return qkv and both weights; positions; gradients of q, k and v. Far positions make float32 angles inexact."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = torch.randn(tokens, heads[0] + 2 * heads[1], width, generator=generator) * 3
    weights = [1 + 0.3 * torch.randn(width, generator=generator) for _ in range(2)]
    upstream = [torch.randn(tokens, heads[i], width, generator=generator).to(device, dtype) for i in (0, 1, 1)]
    positions = torch.randint(0, furthest, (tokens,), generator=generator, dtype=torch.int32)
    return [x.to(device, dtype) for x in (qkv, *weights)], positions.to(device), upstream


def run(backend: str, leaves: list[Tensor], positions: Tensor, upstream: list[Tensor], theta: float = 1e4) -> list[Tensor]:
    """q, k, v and the gradients of qkv and, where there are two more leaves, of the weights."""
    heads, key_value_heads = upstream[0].shape[1], upstream[1].shape[1]

    def operation(qkv: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        sizes = {"heads": heads, "key_value_heads": key_value_heads, "theta": theta}
        return qk_norm_rope(qkv, q_weight, k_weight, positions, backend=backend, **sizes)

    return with_gradients(operation, leaves, upstream)


def exactly(leaves: list[Tensor], positions: Tensor, upstream: list[Tensor], theta: float = 1e4) -> list[Tensor]:
    sizes = {"heads": upstream[0].shape[1], "key_value_heads": upstream[1].shape[1], "theta": theta}
    wide = [x.double() for x in leaves]
    return with_gradients(lambda x, q=None, k=None: reference.qk_norm_rope(x, q, k, positions, **sizes), wide, upstream)


def of_the_model(leaves: list[Tensor], positions: Tensor, upstream: list[Tensor], theta: float = 1e4) -> list[Tensor]:
    """The plain operation, as models write it: norm, angle and rotation in the dtype of the input, angle in float32."""
    heads, width = [x.shape[1] for x in upstream], upstream[0].shape[-1]
    angles = positions.float().unsqueeze(-1) / theta ** (torch.arange(0, width, 2, device=positions.device) / width)
    angles = torch.cat([angles, angles], -1).unsqueeze(-2)
    cosine, sine = angles.cos().to(leaves[0].dtype), angles.sin().to(leaves[0].dtype)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], -1) * sine

    def operation(qkv: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.split(heads, 1)
        if q_weight is not None:
            q, k = (torch.rms_norm(x, (width,), weight, 1e-6) for x, weight in ((q, q_weight), (k, k_weight)))
        return rotate(q), rotate(k), v

    return with_gradients(operation, leaves, upstream)


@settings(max_examples=25)
@given(
    st.sampled_from([0, *range(6, 13)]), st.integers(1, 5), st.integers(1, 3), st.sampled_from([64, 80, 96, 128]),
    st.sampled_from(INTERPRETED), st.booleans(), st.booleans(), st.sampled_from([1e4, 5e5]),
    st.sampled_from([3, 500, FURTHEST]),
)  # fmt: skip
@example(6, 1, 1, 64, torch.float32, True, True, 1e4, FURTHEST)
def test_errs_no_more_than_twice_the_plain_operation(
    tokens: int, heads: int, key_value_heads: int, width: int, dtype: torch.dtype, norm: bool, slices: bool,
    theta: float, furthest: int,
) -> None:  # fmt: skip
    leaves, positions, upstream = inputs(tokens, (heads, key_value_heads), width, dtype, furthest=furthest)
    leaves = leaves if norm else leaves[:1]
    used, used_upstream = leaves, upstream
    if slices and tokens:
        used, used_upstream = [strided(leaves[0]), *leaves[1:]], [strided(x) for x in upstream]
    with small_blocks():
        found = run("triton", used, positions, used_upstream, theta)
    plain = of_the_model(leaves, positions, upstream, theta)
    exact = exactly(leaves, positions, upstream, theta)
    check_errors(found, plain, exact)
    check_errors(run("torch", leaves, positions, upstream, theta), plain, exact)


def test_one_token() -> None:
    """Each token alone. All numbers of a head share the rounding of one statistic, so that errors of many are judged."""
    leaves, positions, upstream = inputs(16, (1, 1), 64, torch.float32)
    results = []
    for function in (lambda *x: run("triton", *x), of_the_model, exactly):
        tokens = [
            function([leaves[0][i : i + 1], *leaves[1:]], positions[i : i + 1], [g[i : i + 1] for g in upstream])
            for i in range(16)
        ]
        results.append([torch.stack(kind) for kind in zip(*tokens, strict=True)])
    check_errors(*results)


@pytest.mark.parametrize("positions", [range(40), range(FURTHEST - 40, FURTHEST), [-1, 10**7, -(10**7)]])
def test_angles_are_right_to_float32_at_any_position(positions: list[int]) -> None:
    places = torch.tensor(positions, dtype=torch.int32)
    (qkv, *_), _, upstream = inputs(len(places), (1, 1), 128, torch.float32)
    qkv[:] = torch.cat([torch.ones(64), torch.zeros(64)])  # which turns into cosine and sine
    exact = exactly([qkv], places, upstream)[0]
    angles = torch.atan2(*reversed(exact.chunk(2, -1))).float()
    judge = torch.cat([angles.cos(), angles.sin()], -1)  # the best that torch does from a float32 angle
    for backend in ("triton", "torch"):
        q = run(backend, [qkv], places, upstream)[0]
        assert (q.double() - exact).abs().max() <= 2 * (judge.double() - exact).abs().max()


def test_every_eighth_of_a_turn() -> None:
    frequencies = torch.tensor([2**61, 2**60, -(2**61), 1])  # an eighth of a turn a position, and so on
    qkv = torch.cat([torch.ones(19, 3, 4), torch.zeros(19, 3, 4)], -1)
    positions = torch.arange(-1, 18)
    q, _, _ = qk_norm_rope(qkv, None, None, positions, heads=1, key_value_heads=1, frequencies=frequencies, backend="triton")
    angles = positions.double()[:, None] * torch.tensor([0.25, 0.125, -0.25, 0]) * torch.pi
    torch.testing.assert_close(q[:, 0].double(), torch.cat([angles.cos(), angles.sin()], -1), atol=2 * 2**-24, rtol=0)


def test_given_frequencies_replace_those_of_the_base() -> None:
    leaves, positions, upstream = inputs(9, (2, 1), 32, torch.float32)
    frequencies = rotary_frequencies(500.0 ** (torch.arange(16, dtype=torch.float64) / -16))
    for backend in ("triton", "torch"):
        found = qk_norm_rope(
            *leaves, positions, heads=2, key_value_heads=1, frequencies=frequencies, backend=backend, theta=7.0
        )
        assert all(map(torch.equal, found, run(backend, leaves, positions, upstream, theta=500.0)[:3]))


@pytest.mark.parametrize("norm", [False, True])
def test_every_run_gives_the_same_bits(norm: bool) -> None:
    leaves, positions, upstream = inputs(30, (4, 2), 32, torch.float32)
    with small_blocks():
        runs = [run("triton", leaves[: 3 if norm else 1], positions, upstream) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_heads_that_are_rows_of_zeros() -> None:
    leaves, positions, upstream = inputs(6, (2, 1), 32, torch.float32)
    leaves[0][::2] = 0
    with small_blocks():
        found = run("triton", leaves, positions, upstream)
    check_errors(found, of_the_model(leaves, positions, upstream), exactly(leaves, positions, upstream))


def test_memory_the_values_are_a_view_and_the_gradient_is_one_tensor() -> None:
    leaves, positions, upstream = inputs(7, (3, 2), 32, torch.float32)
    qkv = leaves[0].flatten(1).requires_grad_() * 1
    qkv.retain_grad()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        q, k, v = qk_norm_rope(qkv, *leaves[1:], positions, heads=3, key_value_heads=2, backend="triton")
    assert v.data_ptr() == qkv[:, 5 * 32 :].data_ptr() and q.is_contiguous() and k.is_contiguous()
    new = [x for x in saved if x.is_floating_point() and x.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()]
    assert sorted(x.numel() for x in new) == [32, 32, 7 * 5]  # the weights, and a number for each normed head
    torch.autograd.backward((q, k, v), upstream)
    assert qkv.grad.is_contiguous() and torch.equal(qkv.grad.view(7, 7, 32)[:, 5:], upstream[2])


def test_heads_before_tokens_in_memory() -> None:
    leaves, positions, upstream = inputs(9, (3, 2), 32, torch.float32)
    right = run("triton", leaves, positions, upstream)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (leaves[0], *upstream)]
    assert all(map(torch.equal, run("triton", [turned[0], *leaves[1:]], positions, turned[1:]), right))
    backwards = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (leaves[0], *upstream)]
    assert all(map(torch.equal, run("triton", [backwards[0], *leaves[1:]], positions.long(), backwards[1:]), right))


def test_weights_of_another_dtype() -> None:
    leaves, positions, upstream = inputs(9, (3, 2), 32, torch.float16)
    leaves[1:] = [weight.float() for weight in leaves[1:]]
    found = run("triton", leaves, positions, upstream)
    assert [x.dtype for x in found] == [torch.float16] * 4 + [torch.float32] * 2
    plain = of_the_model([leaves[0].float(), *leaves[1:]], positions, upstream)
    check_errors([x.float() for x in found[4:]], plain[4:], exactly(leaves, positions, upstream)[4:])


@pytest.mark.parametrize("triton", [False, True])
def test_the_module_stands_in_for_the_models(triton: bool) -> None:
    layout = PackedLayout.from_lengths([4, 7, 2])
    leaves, _, upstream = inputs(len(layout), (3, 2), 32, torch.float32)
    module = QKNormRope(3, 2, 32, theta=500.0, eps=1e-6)
    assert {name: type(child) for name, child in module.named_children()} == {"q_norm": nn.RMSNorm, "k_norm": nn.RMSNorm}
    module.load_state_dict({"q_norm.weight": leaves[1], "k_norm.weight": leaves[2]})
    with mock.patch.object(rope, "runs_triton", return_value=triton):
        found = with_gradients(lambda qkv: module(qkv.flatten(1), layout.positions), leaves[:1], upstream)
        torch.autograd.backward(module(leaves[0], layout.positions)[:2], upstream[:2])
    right = of_the_model(leaves, layout.positions, upstream, theta=500.0)
    torch.testing.assert_close([*found, module.q_norm.weight.grad, module.k_norm.weight.grad], right)


def test_opcheck() -> None:
    leaves, positions, upstream = inputs(5, (3, 2), 32, torch.float32)
    operations, sizes = torch.ops.sbp_kernels, (3, 2, 1e4)
    frequencies = rope.frequencies_of(1e4, 32, torch.device("cpu"))
    for qkv, weights, angles in ((leaves[0], leaves[1:], None), (strided(leaves[0]), [None, None], frequencies)):
        torch.library.opcheck(operations.qk_norm_rope, (qkv, *weights, positions, angles, *sizes, 1e-6))
        rstd = operations.qk_norm_rope(qkv, *weights, positions, angles, *sizes, 1e-6)[2]
        torch.library.opcheck(operations.qk_norm_rope_backward, (*upstream, qkv, *weights, positions, angles, rstd, 1e4))
    torch.library.opcheck(operations.rotation, (positions, None, 32, 1e4, torch.float32))


@pytest.mark.parametrize("norm", [False, True])
def test_compiles_whole_and_twice_at_most(norm: bool) -> None:
    torch.compiler.reset()  # it would remember which sizes change
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(positions: Tensor, qkv: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pair = weights or (None, None)
        return qk_norm_rope(qkv, *pair, positions, heads=3, key_value_heads=2, backend="triton")

    for tokens in (5, 9, 13, 30, 17):
        leaves, positions, upstream = inputs(tokens, (3, 2), 32, torch.float32)
        leaves = leaves if norm else leaves[:1]
        found = with_gradients(lambda *x, p=positions: compiled(p, *x), leaves, upstream)
        assert all(map(torch.equal, found, run("triton", leaves, positions, upstream)))
    assert counter.frame_count == 2  # one more where the number of tokens first changes


def test_a_compiler_sees_plain_operations_and_angles_once() -> None:
    leaves, positions, _ = inputs(5, (3, 2), 32, torch.float32)
    operations: list[str] = []

    def layers(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        for _ in range(3):
            qkv = torch.cat(qk_norm_rope(qkv, q_weight, k_weight, positions, heads=3, key_value_heads=2), 1)
        return qkv

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        operations.extend(str(node.target) for node in graph.graph.nodes if "sbp_kernels" in str(node.target))
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)  # Inductor's partition
    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    compiled(*(x.requires_grad_() for x in leaves))
    assert operations == ["sbp_kernels.rotation.default"]


def test_activation_checkpointing() -> None:
    leaves, positions, upstream = inputs(9, (3, 2), 32, torch.float32)

    def operation(*tensors: Tensor) -> tuple[Tensor, ...]:
        return checkpoint(
            lambda *x: qk_norm_rope(*x, positions, heads=3, key_value_heads=2, backend="triton"), *tensors, use_reentrant=False
        )

    assert all(map(torch.equal, with_gradients(operation, leaves, upstream), run("triton", leaves, positions, upstream)))


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (qkv, *weights), positions, _ = inputs(5, (3, 2), 32, torch.float32)
    for arguments, options, message in [
        ((qkv[:, :6], *weights, positions), {}, r"qkv must be \[T"),
        ((qkv.flatten(1)[:, :-7], *weights, positions), {}, r"qkv must be \[T, 3 \+ 2 \* 2, D\] with D even"),
        ((qkv[..., :31], *weights, positions), {}, "with D even"),
        ((qkv, *weights, positions), {"heads": 0}, r"qkv must be \[T, 0"),
        ((qkv, weights[0], None, positions), {}, "q_weight and k_weight go together"),
        ((qkv, weights[0][:5], weights[1], positions), {}, r"q_weight must be \[32\]"),
        ((qkv, weights[0], weights[1].to("meta"), positions), {}, r"k_weight must be \[32\] on cpu"),
        ((qkv, *weights, positions[:4]), {}, r"positions must be int32 \[5\]"),
        ((qkv, *weights, positions.float()), {}, r"positions must be int32"),
        ((qkv, *weights, positions.to("meta")), {}, r"move the layout with layout.to"),
        ((qkv, *weights, positions), {"frequencies": torch.ones(16)}, "make them with rotary_frequencies"),
        ((qkv, *weights, positions), {"backend": "cuda"}, "backend 'cuda' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            qk_norm_rope(*arguments, **{"heads": 3, "key_value_heads": 2, **options})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors"):
        qk_norm_rope(qkv, *weights, positions, heads=3, key_value_heads=2, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "width"),
    [(1, (2, 1), 64), (1000, (24, 8), 128), (333, (64, 8), 128), (100, (9, 3), 64), (77, (32, 8), 96)],
)
def test_on_a_gpu(tokens: int, heads: tuple[int, int], width: int, norm: bool, dtype: torch.dtype) -> None:
    leaves, positions, upstream = inputs(tokens, heads, width, dtype, "cuda", furthest=500)
    leaves = leaves if norm else leaves[:1]
    with guarded_memory():
        found, again = run("auto", leaves, positions, upstream), run("triton", leaves, positions, upstream)
    assert all(map(torch.equal, found, again))
    check_errors(found, of_the_model(leaves, positions, upstream), exactly(leaves, positions, upstream))


def test_frequencies_made_while_a_graph_is_captured_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def make(theta: float, width: int, device: torch.device) -> Tensor:
        made.append(rope.frequencies_of(theta, width, torch.device("cpu")))
        return made[-1]

    device, capturing = torch.device("cuda", 0), True
    monkeypatch.setattr(rope_kernels, "frequencies_of", make)
    monkeypatch.setattr(rope_kernels, "_MADE", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    inside = [rope_kernels._frequencies(None, 1e4, 16, device) for _ in range(2)]
    assert inside[0] is made[0] and inside[1] is made[1]  # each part of the graph
    capturing = False
    outside = rope_kernels._frequencies(None, 1e4, 16, device)
    assert outside is made[2] and rope_kernels._frequencies(None, 1e4, 16, device) is outside
    capturing = True
    assert rope_kernels._frequencies(None, 1e4, 16, device) is outside and len(made) == 3
