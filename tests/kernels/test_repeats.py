"""`repeats` by every backend against brute force; the Triton kernel in Triton's interpreter."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sbp_kernels.repeats import repeats
from sbp_kernels.repeats import triton as repeats_kernels
from torch import Tensor

BACKENDS = ["torch", "numba", "triton"]


def occurred_before(text: list[int], width: int) -> bool:
    return any(text[start : start + width] == text[-width:] for start in range(len(text) - width)) and len(text) >= width


def common_suffix(text: list[int], lag: int) -> int:
    earlier = text[: len(text) - lag]
    count = 0
    while count < len(earlier) and earlier[-1 - count] == text[-1 - count]:
        count += 1
    return count


def follow(backend: str, texts: list[list[int]], width: int, capacity: int, starts: list[int]) -> None:
    """Draw the texts side by side, row r from step starts[r] on, and check every answer and all of the state."""
    rows = len(texts)
    suffix_lengths = torch.full((rows, capacity), 999, dtype=torch.int16)  # of whatever was there before
    tokens, lengths = torch.full((rows, capacity), -7, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    for step in range(max(start + len(text) for start, text in zip(starts, texts, strict=True))):
        now = []
        for row, (start, text) in enumerate(zip(starts, texts, strict=True)):
            now.append(text[: max(step + 1 - start, 0)] if step < start + len(text) else [])
            lengths[row] = len(now[row])
            tokens[row, : len(now[row])] = torch.tensor(now[row], dtype=torch.int32)
        before = suffix_lengths.clone()
        repeated = repeats(suffix_lengths, tokens, lengths, width, backend=backend)
        assert repeated.dtype == torch.bool
        assert repeated.tolist() == [occurred_before(text, width) for text in now]
        for row, text in enumerate(now):
            suffixes = [common_suffix(text, lag) if 0 < lag < len(text) else 0 for lag in range(capacity)]
            assert suffix_lengths[row].tolist() == (suffixes if text else before[row].tolist())


@settings(max_examples=60)
@given(
    st.sampled_from(BACKENDS),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=14), min_size=1, max_size=3),
    st.integers(1, 5),
    st.data(),
)
def test_every_answer_is_that_of_brute_force(backend: str, texts: list[list[int]], width: int, data: st.DataObject) -> None:
    capacity = max(map(len, texts)) + data.draw(st.integers(0, 3))
    starts = [data.draw(st.integers(0, 4)) for _ in texts]
    with mock.patch.object(repeats_kernels, "BLOCK", data.draw(st.sampled_from([4, 1024]))):
        follow(backend, texts, width, capacity, starts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_that_overlap_are_repeats(backend: str) -> None:
    follow(backend, [[1, 2, 1, 2, 1, 2], [5, 5, 5, 5], [1, 2, 3, 4, 1, 2]], 4, 8, [0, 0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_suffix_lengths_stop_at_the_largest_int16(backend: str) -> None:
    suffix_lengths = torch.tensor([[0, 32_766, 32_767, 5]], dtype=torch.int16)
    tokens = torch.tensor([[3, 3, 3, 3]], dtype=torch.int32)
    assert repeats(suffix_lengths, tokens, torch.tensor([4], dtype=torch.int32), 32_767, backend=backend).tolist() == [True]
    assert suffix_lengths.tolist() == [[0, 32_767, 32_767, 6]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_no_rows(backend: str) -> None:
    def follow_strided(wide: bool) -> tuple[list[bool], Tensor]:
        random = np.random.default_rng(0)
        text = torch.from_numpy(random.integers(0, 2, (3, 20)).astype(np.int32))
        suffix_lengths, tokens = (
            torch.full((3, 20 + 9 * wide), 3, dtype=dtype)[:, :20] for dtype in (torch.int16, torch.int32)
        )
        tokens.copy_(text)
        lengths = torch.zeros(3, 2, dtype=torch.int32)[:, 0] if wide else torch.zeros(3, dtype=torch.int32)
        answers = []
        for length in range(1, 21):
            lengths.fill_(length)
            answers += repeats(suffix_lengths, tokens, lengths, 3, backend=backend).tolist()
        return answers, suffix_lengths

    for mine, right in zip(follow_strided(True), follow_strided(False), strict=True):
        assert torch.equal(mine, right) if isinstance(mine, Tensor) else mine == right
    nothing = torch.zeros(0, 5, dtype=torch.int16)
    assert repeats(nothing, nothing.int(), torch.zeros(0, dtype=torch.int32), 2, backend=backend).shape == (0,)


def test_opcheck_of_the_declared_mutations() -> None:
    suffix_lengths, tokens = torch.zeros(2, 6, dtype=torch.int16), torch.zeros(2, 6, dtype=torch.int32)
    torch.library.opcheck(torch.ops.sbp_kernels.repeats, (suffix_lengths, tokens, torch.full((2,), 4, dtype=torch.int32), 2))


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    suffix_lengths, tokens, lengths = torch.zeros(2, 6, dtype=torch.int16), torch.zeros(2, 6).int(), torch.zeros(2).int()
    for arguments, options, message in [
        ((suffix_lengths.int(), tokens, lengths, 2), {}, r"suffix_lengths must be int16 \[B, T\]"),
        ((suffix_lengths, tokens[:, 1:], lengths, 2), {}, r"tokens must be int32 \[2, 6\]"),
        ((suffix_lengths, tokens.long(), lengths, 2), {}, "tokens must be int32"),
        ((suffix_lengths, tokens, lengths[:1], 2), {}, r"lengths must be int32 \[2\]"),
        ((suffix_lengths, tokens, lengths.to("meta"), 2), {}, "lengths must be int32 .* on cpu"),
        ((suffix_lengths.T.contiguous().T, tokens, lengths, 2), {}, "must be side by side in memory"),
        ((suffix_lengths, tokens, lengths, 0), {}, "width must be from 1 to 32767: got 0"),
        ((suffix_lengths, tokens, lengths, 2), {"backend": "cuda"}, "backend 'cuda' is unknown"),
        (
            (suffix_lengths.to("meta"), tokens.to("meta"), lengths.to("meta"), 2),
            {"backend": "numba"},
            "'numba' takes tensors on the CPU",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            repeats(*arguments, **options)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' needs CUDA tensors"):
        repeats(suffix_lengths, tokens, lengths, 2, backend="triton")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    text = torch.randint(0, 3, (300, 1500), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    states = [torch.zeros(300, 1500, dtype=torch.int16), torch.zeros(300, 1500, dtype=torch.int16, device="cuda")]
    on_device = text.cuda()
    for length in range(1, 1501):
        lengths = torch.full((300,), length, dtype=torch.int32)
        right = repeats(states[0], text, lengths, 9)
        assert torch.equal(repeats(states[1], on_device, lengths.cuda(), 9).cpu(), right)
    assert torch.equal(states[1].cpu(), states[0])
