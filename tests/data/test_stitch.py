import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import write_documents

from sbp_fast.data.token_shards.corpus import Corpus
from sbp_fast.data.token_shards.stitch import stitch_documents


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(2, 12), st.booleans()), min_size=1, max_size=30), st.integers(4, 30), st.integers(0, 9))
def test_joined_documents_hold_every_text_once_within_the_limit(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[int, bool]], longest: int, seed: int
) -> None:
    directory = tmp_path_factory.mktemp("stitch")
    generator = np.random.default_rng(seed)
    documents = [generator.integers(3, 300, length) for length, _ in drawn]
    corpus = write_documents(directory / "plain", documents)
    order, begins = generator.permutation(len(documents)), np.array([begin for _, begin in drawn])
    begins[0] = True
    count = stitch_documents(corpus, order, begins, longest, directory / "stitched")
    stitched = Corpus(directory / "stitched")
    assert len(stitched) == count and stitched.tokens == corpus.tokens
    joined = np.concatenate([stitched[number] for number in range(count)])
    assert np.array_equal(joined, np.concatenate([corpus[int(document)] for document in order]))
    position = 0
    for number, parts in enumerate(stitched.column("parts").tolist()):
        members = order[position : position + parts]
        assert parts == 1 or len(stitched[number]) <= longest
        assert not begins[position + 1 : position + parts].any()
        assert stitched.ids[number] == corpus.ids[members[0]]
        assert stitched.column("text_bytes")[number] == corpus.column("text_bytes")[members].sum()
        following = position + parts
        if following < len(order) and not begins[following]:  # whatever could follow did
            assert len(stitched[number]) + len(corpus[int(order[following])]) > longest
        position = following
