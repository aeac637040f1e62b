"""Drawing tokens, by every backend; the Triton kernel in Triton's interpreter."""

from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels.sampling import api as sampling
from sbp_kernels.sampling import sample_tokens
from sbp_kernels.sampling import triton as sampling_kernels
from sbp_kernels.sampling.reference import sampling_probabilities
from scipy.stats import chisquare
from small_ops import check_errors
from torch import Tensor

BACKENDS = ["torch", "numba", "triton"]
LAST = 1 - 2**-53  # the greatest uniform


def draw(backend: str, logits: Tensor, uniforms: list[float] | Tensor, **options: object) -> list[int]:
    uniforms = torch.as_tensor(uniforms, dtype=torch.float64)
    return sample_tokens(logits.expand(len(uniforms), -1), uniforms, backend=backend, **options)[0].tolist()


def uniforms_of(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over a row is quick on a GPU but not in the interpreter."""
    monkeypatch.setattr(sampling_kernels, "PIVOTS", 256)


RULES = [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.6, 0.9, 0), (1.0, 0.35, 0), (1.0, 1.0, 7), (0.8, 0.8, 9)]


def example(rule: tuple[float, float, int]) -> tuple[Tensor, dict[str, object], np.ndarray]:
    """Logits, options and the exact probabilities."""
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, 40).astype(np.float32))
    forbidden = torch.tensor([int(logits.argmax()), 3])
    options = dict(zip(("temperature", "top_p", "top_k"), rule, strict=True)) | {"forbidden": forbidden}
    return logits, options, sampling_probabilities(logits[None], **options)[0].numpy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_each_token_has_its_share_of_the_uniforms(backend: str, rule: tuple[float, float, int]) -> None:
    """In the order of ids: of uniforms on a grid each token gets its share to within one."""
    logits, options, expected = example(rule)
    draws = 25 if backend == "triton" else 20_000
    drawn = draw(backend, logits, (torch.arange(draws, dtype=torch.float64) + 0.5) / draws, **options)
    assert drawn == sorted(drawn)
    counts = np.bincount(drawn, minlength=40)
    assert counts[expected == 0].sum() == 0
    assert np.abs(counts - expected * draws).max() <= 1


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("rule", RULES)
def test_samples_follow_the_exact_probabilities(backend: str, rule: tuple[float, float, int]) -> None:
    logits, options, expected = example(rule)
    draws = 50_000
    counts = np.bincount(draw(backend, logits, uniforms_of(draws), **options), minlength=40)
    inside = expected > 0
    assert counts[~inside].sum() == 0
    common = expected * draws >= 5  # the rest is counted as one class, as the test wants
    observed = [*counts[common], counts[inside & ~common].sum()]
    wanted = [*(expected[common] * draws), expected[inside & ~common].sum() * draws]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("top_p", "top_k", "reachable"),
    [
        (0.01, 0, {2}),
        (0.49, 0, {2}),
        (0.51, 0, {0, 2}),
        (0.74, 0, {0, 2}),
        (0.76, 0, {0, 1, 2}),
        (0.9, 0, {0, 1, 2, 3}),
        (1.0, 1, {2}),
        (1.0, 4, {0, 1, 2, 3}),
        (1.0, 5, {0, 1, 2, 3, 4}),
        (1.0, 9, {0, 1, 2, 3, 4}),
        (0.6, 2, {2}),  # the two hold 2/3 and 1/3 of what is left
        (0.7, 2, {0, 2}),
        (0.6, 3, {0, 2}),
    ],
)
def test_top_k_and_top_p_end_at_the_expected_token(backend: str, top_p: float, top_k: int, reachable: set[int]) -> None:
    logits = torch.tensor([0.25, 0.125, 0.5, 0.0625, 0.0625]).log()  # of the two equal ones the lower id is in first
    uniforms = torch.linspace(0, LAST, 19, dtype=torch.float64)
    assert set(draw(backend, logits, uniforms, temperature=1.0, top_p=top_p, top_k=top_k)) == reachable


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 4), (0.5001, 5), (0.125, 1), (0.0001, 1), (0.875, 7), (0.876, 8)])
def test_a_nucleus_of_equal_tokens_is_the_first_of_them(backend: str, top_p: float, kept: int) -> None:
    """Sums of equal weights are exact, so that the nucleus may hold top_p exactly."""
    logits = torch.full((300,), -5.0)
    ids = torch.arange(290, 2, -37)[:8]
    logits[ids] = 60.0
    uniforms = torch.linspace(0, LAST, 10, dtype=torch.float64)
    assert set(draw(backend, logits, uniforms, temperature=1.0, top_p=top_p)) == set(sorted(ids.tolist())[:kept])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_token_can_be_sampled_without_a_cut(backend: str) -> None:
    logits = torch.tensor([0.0, 3.0, -25.0])  # float32 probabilities that sum to 1 before the last is added
    ends = logits.double().softmax(-1).cumsum(0)
    uniforms = [0.0, float(ends[0]) * 0.999, float(ends[0]) * 1.001, (float(ends[1]) + 1) / 2, LAST]
    assert draw(backend, logits, uniforms, temperature=1.0) == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("top_p", "top_k"), [(0.3, 0), (0.9, 0), (1.0, 0), (1.0, 2), (1.0, 5), (0.9, 5)])
def test_forbidden_tokens_are_never_sampled(backend: str, top_p: float, top_k: int) -> None:
    """Neither forbidden tokens, however probable, nor those of probability zero."""
    logits = torch.full((300,), float("-inf"))
    logits[[3, 7, 8, 290]] = torch.tensor([90.0, 0.0, 0.0, 1e4])
    options = {"top_p": top_p, "top_k": top_k, "forbidden": torch.tensor([290, 0, 3, 290])}
    allowed = {7} if top_p == 0.3 else {7, 8}
    assert set(draw(backend, logits, [0.0, 0.4, 0.6, LAST], temperature=1.0, **options)) == allowed
    assert set(draw(backend, logits, [0.0, LAST], temperature=0.0, **options)) == {7}
    assert set(draw(backend, logits, [0.0, LAST], temperature=1e-60, **options)) <= {7, 8}


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_zero_takes_the_first_of_the_most_probable(backend: str) -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    logits[:, [400, 33, 180]] = 9.0
    logits[5, 33] = -0.0
    uniforms, forbidden = torch.full((6,), float("nan"), dtype=torch.float64), torch.tensor([33, 499])
    for taken, options in (([33, 33, 33, 33, 33, 180], {}), ([180] * 6, {"forbidden": forbidden})):
        assert sample_tokens(logits, uniforms, temperature=0, backend=backend, **options)[0].tolist() == taken
    zeros = torch.tensor([[-1.0, -0.0, 0.0]])
    assert sample_tokens(zeros, uniforms[:1], temperature=0, backend=backend)[0].tolist() == [1]


@settings(max_examples=150)
@given(
    st.sampled_from(["numba"] * 4 + ["triton"]),
    st.integers(1, 700),
    st.sampled_from([0.0, 0.02, 1.0, 4.0, 30.0]),
    st.sampled_from([1.0, 0.3, 2.0]),
    st.one_of(st.just(1.0), st.floats(0.001, 1.0)),
    st.one_of(st.just(0), st.integers(1, 800)),
    st.integers(0, 2**32),
)
def test_all_backends_sample_the_same_tokens(
    backend: str, vocabulary: int, spread: float, temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy((random.normal(0, 1, (4, vocabulary)).round(2) * spread).astype(np.float32))  # with ties
    forbidden = torch.from_numpy(random.integers(0, vocabulary, 2)) if vocabulary > 2 else None
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "forbidden": forbidden}
    uniforms = torch.from_numpy(random.random(4))
    mine, _ = sample_tokens(logits, uniforms, backend=backend, **options)
    expected, _ = sample_tokens(logits.double(), uniforms, backend="torch", **options)
    assert mine.tolist() == expected.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_log_probabilities_are_those_of_the_whole_distribution(backend: str, spread: float, temperature: float) -> None:
    logits = spread * torch.randn(64, 300, generator=torch.Generator().manual_seed(7))
    forbidden = torch.tensor([5, 5, 200])
    logits[:8, 200] += 5 * spread
    options = {"temperature": temperature, "top_p": 0.5 if temperature == 0.5 else 1.0, "forbidden": forbidden}
    check_scores(logits, *sample_tokens(logits, uniforms_of(64), backend=backend, **options))


def check_scores(logits: Tensor, tokens: Tensor, scores: Tensor) -> None:
    """Log-probabilities err at most twice as much as torch's operation in float32."""
    exact, plain = (x.log_softmax(-1).gather(1, tokens[:, None])[:, 0] for x in (logits.double(), logits.float()))
    check_errors([scores], [plain], [exact])


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_a_wide_vocabulary(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of many sizes: the edge of a cut is looked for among all of them."""
    monkeypatch.undo()  # as many passes as on a GPU
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 20_011, generator=generator) * torch.tensor([[0.01], [3.0], [1e3]])
    uniforms = uniforms_of(3)
    for options in ({"top_p": 0.6}, {"top_k": 1000}, {"top_k": 5000, "top_p": 0.9}, {}):
        expected, _ = sample_tokens(logits.double(), uniforms, temperature=1.0, backend="torch", **options)
        assert sample_tokens(logits, uniforms, temperature=1.0, backend=backend, **options)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_no_other(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, uniforms = torch.randn(6, 333, generator=generator) * 3, uniforms_of(6)
    options = {"temperature": 0.9, "top_p": 0.8, "top_k": 200, "backend": backend}
    together = sample_tokens(logits, uniforms, **options)
    order = torch.tensor([4, 0, 5])
    others = sample_tokens(logits[order], uniforms[order], **options)
    for whole, part in zip(together, others, strict=True):
        assert torch.equal(whole[order], part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_no_rows(backend: str) -> None:
    logits, uniforms = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)), uniforms_of(4)
    expected = sample_tokens(logits, uniforms, temperature=1.0, top_p=0.9, backend=backend)
    columns = torch.full((50, 9), float("nan"))
    columns[:, 1:5] = logits.T
    spread = torch.stack([uniforms, torch.full_like(uniforms, float("nan"))], 1)
    found = sample_tokens(columns[:, 1:5].T, spread[:, 0], temperature=1.0, top_p=0.9, backend=backend)
    assert all(map(torch.equal, found, expected))
    tokens, scores = sample_tokens(logits[:0], uniforms[:0], temperature=1.0, top_p=0.9, backend=backend)
    assert (tokens.shape, tokens.dtype, scores.shape, scores.dtype) == ((0,), torch.int64, (0,), torch.float32)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_rows_of_nan_terminate(backend: str) -> None:
    logits = torch.full((2, 70), float("nan"))
    for options in ({"temperature": 0.0}, {}, {"top_p": 0.5, "top_k": 9}):
        tokens, _ = sample_tokens(logits, uniforms_of(2), **{"temperature": 1.0, **options}, backend=backend)
        assert ((tokens >= 0) & (tokens < 70)).all()


def test_logits_of_half_precision() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(5)).half() * 4
    for options in ({}, {"top_p": 0.7}, {"top_k": 20}, {"top_k": 40, "top_p": 0.9, "forbidden": torch.tensor([7])}):
        expected, _ = sample_tokens(logits.double(), uniforms_of(4), temperature=0.8, backend="torch", **options)
        for backend in BACKENDS:
            mine, _ = sample_tokens(logits, uniforms_of(4), temperature=0.8, backend=backend, **options)
            assert mine.tolist() == expected.tolist()


def test_opcheck_and_compilation() -> None:
    logits, uniforms, forbidden = torch.randn(3, 40), uniforms_of(3), torch.tensor([4])
    torch.library.opcheck(torch.ops.sbp_kernels.sample_tokens, (logits, uniforms, 1.0, 0.9, 5, forbidden))
    for backend in ("torch", "triton"):
        draw_with = partial(sample_tokens, temperature=1.0, top_p=0.9, forbidden=forbidden, backend=backend)
        compiled = torch.compile(draw_with, fullgraph=True, backend="aot_eager")
        assert all(map(torch.equal, compiled(logits, uniforms), draw_with(logits, uniforms)))


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, uniforms = torch.zeros(3, 8), uniforms_of(3)
    for arguments, options, message in [
        ((logits[0], uniforms), {}, r"logits must be floating-point \[B, V\]"),
        ((logits.long(), uniforms), {}, "logits must be floating-point"),
        ((logits, uniforms[:2]), {}, r"uniforms must be float64 \[3\]"),
        ((logits, uniforms.float()), {}, "uniforms must be float64"),
        ((logits, uniforms), {"forbidden": torch.ones(1)}, r"forbidden must be int64 \[F\]"),
        ((logits, uniforms.to("meta")), {}, "must be on one device"),
        ((logits, uniforms), {"temperature": -1.0}, "temperature and top_k must be at least 0"),
        ((logits, uniforms), {"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ((logits, uniforms), {"top_k": -1}, "top_k=-1"),
        ((logits, uniforms), {"backend": "cuda"}, "backend 'cuda' is unknown: use one of auto, torch, triton, numba"),
        ((logits.double(), uniforms), {"backend": "numba"}, "'numba' takes logits of 16 or 32 bits on the CPU, not"),
        ((logits.double(), uniforms), {"backend": "triton"}, "cast torch.float64, or use backend='torch'"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample_tokens(*arguments, **{"temperature": 1.0, **options})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors"):
        sample_tokens(logits, uniforms, temperature=1.0, backend="triton")


def test_auto_is_the_first_that_can_run() -> None:
    cuda = mock.Mock(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda"))
    assert sampling._resolved("auto", cuda) == "triton"
    assert sampling._resolved("auto", torch.zeros(1, 2)) == "numba"
    assert sampling._resolved("auto", torch.zeros(1, 2).half()) == "numba"
    assert sampling._resolved("auto", torch.zeros(1, 2).double()) == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [4096, 151_936])
def test_on_a_gpu(dtype: torch.dtype, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    logits = (3 * torch.randn(32, vocabulary, generator=torch.Generator().manual_seed(6))).to("cuda", dtype)
    uniforms, forbidden = uniforms_of(32).cuda(), torch.tensor([1, vocabulary - 1], device="cuda")
    for options in ({"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 50}, {"temperature": 0.7, "top_k": 999, "top_p": 0.8}):
        options = {"temperature": 1.0, "forbidden": forbidden, **options}
        expected, _ = sample_tokens(logits.double(), uniforms, backend="torch", **options)
        mine, scores = sample_tokens(logits, uniforms, backend="triton", **options)
        assert (mine != expected).sum() <= 1  # a uniform may fall between the roundings of a running sum
        check_scores(logits, mine, scores)
        again, _ = sample_tokens(logits[7:9], uniforms[7:9], backend="triton", **options)
        assert torch.equal(again, mine[7:9])
