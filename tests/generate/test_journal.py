from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_fast.generate.decoder import STOPS
from sbp_fast.generate.engine import GenerationResult
from sbp_fast.generate.journal import Journal

RESULTS = st.lists(
    st.builds(
        GenerationResult,
        seed=st.integers(0, 2**40),
        sample=st.integers(0, 2**40),
        tokens=st.lists(st.integers(0, 2**31 - 1), max_size=20).map(lambda ids: np.array(ids, np.int32)),
        stop=st.sampled_from(STOPS[1:]),
        log_probability=st.floats(-1e6, 0),
    ),
    max_size=8,
    unique_by=lambda result: (result.seed, result.sample),
)


def described(results: list[GenerationResult]) -> list[tuple[object, ...]]:
    return [(result.seed, result.sample, result.tokens.tolist(), result.stop, result.log_probability) for result in results]


def write(path: Path, results: list[GenerationResult]) -> list[int]:
    """Write a journal; return the offset of each document's end."""
    path.unlink(missing_ok=True)
    journal, ends = Journal(path), []
    for result in results:
        journal.add(result)
        ends.append(path.stat().st_size)
    journal.close()
    return ends


def read(path: Path) -> list[GenerationResult]:
    journal = Journal(path)
    journal.close()
    return list(journal.results.values())


@settings(max_examples=60, deadline=None)
@given(RESULTS, st.randoms(use_true_random=False))
def test_truncated_journal_keeps_whole_documents_and_accepts_the_rest_again(
    tmp_path_factory: pytest.TempPathFactory, results: list[GenerationResult], random: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "shard.journal"
    ends = write(path, results)
    assert described(read(path)) == described(results)
    cut = random.randint(0, path.stat().st_size)  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:cut])
    whole = sum(end <= cut for end in ends)
    journal = Journal(path)
    assert described(list(journal.results.values())) == described(results[:whole])
    for result in results[whole:]:
        journal.add(result)
    journal.close()
    assert described(read(path)) == described(results)


def test_flipped_bit_loses_only_the_documents_from_there_on(tmp_path: Path) -> None:
    results = [GenerationResult(number, 1, np.arange(number), "end", -1.5) for number in range(4)]
    ends = write(tmp_path / "shard.journal", results)
    content = (tmp_path / "shard.journal").read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "damaged.journal").write_bytes(damaged)
        whole = sum(end <= position for end in ends)
        assert described(read(tmp_path / "damaged.journal")) == described(results[:whole])
