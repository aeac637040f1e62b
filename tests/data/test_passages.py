from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.data.passages import split_passages

PROSE = st.lists(
    st.sampled_from(["a", "word", "longer", "end. ", "“Said.” ", "\n", "\n\n", " ", "  \n \n", "\t"]), max_size=200
)


@given(pieces=PROSE, maximum=st.integers(1, 60))
def test_split_passages_loses_only_white_space_at_the_boundaries(pieces: list[str], maximum: int) -> None:
    text = "".join(pieces).strip()
    passages = split_passages(text, maximum)
    at = 0
    for passage in passages:
        start = text.index(passage, at)
        assert not text[at:start].strip()
        at = start + len(passage)
    assert at == len(text)
    assert all(0 < len(passage) <= maximum and passage == passage.strip() for passage in passages) or not text


@given(words=st.lists(st.text("abc", min_size=1, max_size=8), min_size=40, max_size=300), maximum=st.integers(40, 120))
def test_split_passages_keeps_words_whole_and_leaves_no_tiny_passage(words: list[str], maximum: int) -> None:
    passages = split_passages(" ".join(words), maximum)
    assert [word for passage in passages for word in passage.split(" ")] == words
    assert all(len(passage) >= maximum // 4 for passage in passages) or len(passages) == 1


def test_the_best_boundary_in_reach_is_taken() -> None:
    sentence = "The quick brown fox jumps over it. "
    text = sentence * 3 + "\n\n" + sentence * 3 + "\n" + sentence * 6
    assert split_passages(text, 160)[0] == (sentence * 3).strip()  # the paragraph's end, though a line and sentences would fit
    assert split_passages(text.replace("\n\n", ""), 230)[0] == (sentence * 6).strip()  # the line's end
    assert split_passages(sentence * 8, 160)[0] == (sentence * 4).strip()
    assert split_passages("word " * 50, 62)[0] == "word " * 11 + "word"
    assert split_passages("word " * 50, 64)[0] == "word " * 12 + "word"  # fits to the letter
    assert split_passages("x" * 100, 30)[:2] == ["x" * 30, "x" * 30]


def test_a_boundary_that_leaves_a_tiny_passage_is_passed_over() -> None:
    text = "Title\n\n" + "A sentence of some length here. " * 20
    passages = split_passages(text, 200)
    assert len(passages[0]) > 100 and passages[0].startswith("Title\n\n")


def test_a_text_that_fits_is_one_passage() -> None:
    assert split_passages(" one\n\ntwo ", 10) == ["one\n\ntwo"]
