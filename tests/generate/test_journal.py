from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_fast.generate.decoder import STOPS
from sbp_fast.generate.engine import Draft
from sbp_fast.generate.journal import Journal

DRAFTS = st.lists(
    st.builds(
        Draft,
        seed=st.integers(0, 2**40),
        sample=st.integers(0, 2**40),
        tokens=st.lists(st.integers(0, 2**31 - 1), max_size=20).map(lambda ids: np.array(ids, np.int32)),
        stop=st.sampled_from(STOPS[1:]),
        log_probability=st.floats(-1e6, 0),
    ),
    max_size=8,
    unique_by=lambda draft: (draft.seed, draft.sample),
)


def described(drafts: list[Draft]) -> list[tuple[object, ...]]:
    return [(draft.seed, draft.sample, draft.tokens.tolist(), draft.stop, draft.log_probability) for draft in drafts]


def write(path: Path, drafts: list[Draft]) -> list[int]:
    """Where each document ends in the file."""
    path.unlink(missing_ok=True)
    journal, ends = Journal(path), []
    for draft in drafts:
        journal.add(draft)
        ends.append(path.stat().st_size)
    journal.close()
    return ends


def read(path: Path) -> list[Draft]:
    journal = Journal(path)
    journal.close()
    return list(journal.drafts.values())


@settings(max_examples=60, deadline=None)
@given(DRAFTS, st.randoms(use_true_random=False))
def test_what_is_whole_survives_and_the_rest_can_be_written_again(
    tmp_path_factory: pytest.TempPathFactory, drafts: list[Draft], random: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "shard.journal"
    ends = write(path, drafts)
    assert described(read(path)) == described(drafts)
    cut = random.randint(0, path.stat().st_size)  # type: ignore[attr-defined]
    path.write_bytes(path.read_bytes()[:cut])
    whole = sum(end <= cut for end in ends)
    journal = Journal(path)
    assert described(list(journal.drafts.values())) == described(drafts[:whole])
    for draft in drafts[whole:]:
        journal.add(draft)
    journal.close()
    assert described(read(path)) == described(drafts)


def test_every_flipped_bit_costs_only_what_follows(tmp_path: Path) -> None:
    drafts = [Draft(number, 1, np.arange(number), "end", -1.5) for number in range(4)]
    ends = write(tmp_path / "shard.journal", drafts)
    content = (tmp_path / "shard.journal").read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        (tmp_path / "damaged.journal").write_bytes(damaged)
        whole = sum(end <= position for end in ends)
        assert described(read(tmp_path / "damaged.journal")) == described(drafts[:whole])
