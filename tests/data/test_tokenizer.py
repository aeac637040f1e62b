import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from sbp_fast.data.round_trip import check_round_trips
from sbp_fast.data.tokenizer import SPECIAL_TOKENS, Tokenizer, join_ids, train_tokenizer
from sbp_fast.errors import UserError

TEXTS = [f"The {number} members of the Congress don't agree on {number * 7} treaties.\n\nNext." for number in range(200)]
TRAINED = train_tokenizer(TEXTS, 400)


@given(text=st.text())
def test_decode_of_encode_is_the_text(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@given(parts=st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", " ", "word"])))
def test_text_is_never_encoded_as_special_tokens(parts: list[str]) -> None:
    text = "".join(parts)
    ids = TRAINED.encode(text)
    assert not {TRAINED.begin, TRAINED.end, TRAINED.partner} & set(ids)
    assert TRAINED.decode([TRAINED.begin, *ids, TRAINED.partner, TRAINED.end]) == text


def test_a_trained_vocabulary_starts_with_special_tokens_and_bytes() -> None:
    assert (TRAINED.begin, TRAINED.end, TRAINED.partner) == (0, 1, 2)
    vocabulary = json.loads(TRAINED.to_json())["model"]["vocab"]
    bytes_256 = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert sorted(vocabulary[byte] for byte in bytes_256) == list(range(3, 259))
    assert TRAINED.vocabulary_size == len(vocabulary) <= 400
    assert train_tokenizer(["ab ab"], 400).vocabulary_size < 400  # runs out of pairs
    # words are split before merging: no token spans two words, two digits or a line end and a letter
    assert not [token for token in vocabulary if token.strip("Ġ").count("Ġ") or sum(map(str.isdigit, token)) > 1]


@pytest.mark.parametrize("word", ["ACGGT" * 60_000, "-" * 300_000, "\n" * 300_000])
def test_word_of_hundreds_of_kilobytes_is_learnt_from_in_seconds_and_encoded(word: str) -> None:
    started = time.monotonic()
    tokenizer = train_tokenizer([f"a {word} word", *TEXTS], 500)
    assert tokenizer.decode(tokenizer.encode(word)) == word
    assert time.monotonic() - started < 30


def test_words_of_usual_length_are_learnt_from_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*TEXTS, "x" * 256, "-" * 256]
    capped = train_tokenizer(texts, 400).to_json()
    monkeypatch.setattr("sbp_fast.data.tokenizer.LONGEST_WORD", 10_000)
    assert train_tokenizer(texts, 400).to_json() == capped


def test_batches_equal_single_texts() -> None:
    texts = [*TEXTS[:5], "", "Ünïcödé 𝄞 \x00\xa0"]
    assert TRAINED.encode_batch(texts) == [TRAINED.encode(text) for text in texts]


@given(documents=st.lists(st.lists(st.integers(0, (1 << 32) - 1), max_size=5), max_size=5))
def test_documents_are_joined_and_enclosed(documents: list[list[int]]) -> None:
    tokens, lengths = join_ids(documents)
    assert tokens.dtype == np.uint32 and lengths.tolist() == list(map(len, documents))
    assert tokens.tolist() == [id for ids in documents for id in ids]
    enclosed, longer = TRAINED.enclose(tokens, lengths)
    assert enclosed.dtype == np.uint32 and longer.tolist() == [length + 2 for length in lengths]
    assert enclosed.tolist() == [id for ids in documents for id in (TRAINED.begin, *ids, TRAINED.end)]


def test_a_saved_tokenizer_loads_the_same_here_and_in_the_library(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TRAINED.save(path)
    loaded, text = Tokenizer(path), TEXTS[3]
    assert loaded.to_json() == TRAINED.to_json()
    assert loaded.encode(text) == TRAINED.encode(text) == tokenizers.Tokenizer.from_file(str(path)).encode(text).ids


def test_training_does_not_depend_on_threads_or_hash_seeds() -> None:
    code = f"from sbp_fast.data.tokenizer import train_tokenizer; print(train_tokenizer({TEXTS!r}, 500).to_json())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(outputs) == 1


def test_a_loaded_tokenizer_gets_the_special_tokens_and_loses_what_would_change_text() -> None:
    bare = tokenizers.Tokenizer.from_str(TRAINED.to_json())
    content = json.loads(bare.to_str())
    content["added_tokens"] = []
    content["model"]["vocab"] = {
        token: id - len(SPECIAL_TOKENS) for token, id in content["model"]["vocab"].items() if token not in SPECIAL_TOKENS
    }
    foreign = tokenizers.Tokenizer.from_str(json.dumps(content))
    foreign.add_special_tokens(["<s>"])
    foreign.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", foreign.token_to_id("<s>"))])
    foreign.enable_truncation(4)
    foreign.enable_padding(length=99)
    size = foreign.get_vocab_size()
    loaded = Tokenizer(foreign.to_str())
    assert (loaded.begin, loaded.end, loaded.partner) == (size, size + 1, size + 2)
    assert loaded.vocabulary_size == size + 3
    text = "the Congress <s> of the treaties agree on it"
    for ids in (loaded.encode(text), loaded.encode_batch([text])[0]):
        assert foreign.token_to_id("<s>") not in ids and loaded.decode(ids) == text


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"not json"]
)
def test_an_unreadable_tokenizer_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        Tokenizer(path)
    assert str(caught.value).startswith(f"{path}: ") and "tokenizer" in caught.value.what


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.json: the tokenizer cannot be read: No such file"):
        Tokenizer(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="Is a directory"):
        Tokenizer(tmp_path)


def altered(**parts: object) -> Tokenizer:
    """Return the trained tokenizer with parts of its file replaced."""
    return Tokenizer(json.dumps(json.loads(TRAINED.to_json()) | parts))


LOSSY = {
    "lowercases": {"normalizer": {"type": "Lowercase"}},
    "normalises": {"normalizer": {"type": "NFKC"}},
    "strips": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
    "has no decoder": {"decoder": None},
}


@pytest.mark.parametrize("part", LOSSY)
def test_a_tokenizer_that_changes_text_is_refused_or_its_losses_are_counted(part: str) -> None:
    tokenizer = altered(**LOSSY[part])
    with pytest.raises(UserError, match=r"does not give back what it encodes: .* comes back as .*corpus.lossy_tokenizer"):
        check_round_trips(tokenizer, TEXTS, lossy=False)
    texts = ["Changed \ufb01 by each ", " kept by most"]
    counts = check_round_trips(tokenizer, texts, lossy=True)
    assert counts == {"round_trips": 2, "round_trips_lost": 2 if part in ("strips", "has no decoder") else 1}


def test_a_byte_level_tokenizer_gives_back_every_text() -> None:
    assert check_round_trips(TRAINED, TEXTS, lossy=False) == {"round_trips": len(TEXTS), "round_trips_lost": 0}


def test_special_tokens_that_the_file_does_not_call_special_are_made_special() -> None:
    content = json.loads(TRAINED.to_json())
    for token in content["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer(json.dumps(content))
    ids = tokenizer.encode("a <|end|> b <|begin|> <|partner|>")
    assert not {tokenizer.begin, tokenizer.end, tokenizer.partner} & set(ids)
    assert tokenizer.decode([tokenizer.begin, *ids, tokenizer.end]) == "a <|end|> b <|begin|> <|partner|>"


def test_a_vocabulary_that_spells_special_tokens_as_words_is_refused() -> None:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<|begin|>": 0, "<|end|>": 1, "<|partner|>": 2, "?": 3}, unk_token="?")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"a text that spells <\|begin\|> is encoded as that token"):
        check_round_trips(Tokenizer(words.to_str()), (), lossy=True)


def test_a_text_that_cannot_be_encoded_is_refused_in_one_line() -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"known": 0}, unk_token="?"))
    with pytest.raises(UserError, match="cannot encode a text"):
        Tokenizer(words.to_str()).encode("unknown")
